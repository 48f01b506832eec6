// What an export says of itself: manifest.json, as docs/export.md describes it. Knows no MLX.

import Foundation

/// Something is wrong with a folder or a file; the message names it.
public struct BMojoError: LocalizedError {
    public let errorDescription: String?

    init(_ message: String) { errorDescription = message }
}

struct Manifest: Decodable {
    struct Function: Decodable {
        let tokens: [Int]?  // the shape of its first argument
        let logits: Bool  // whether it gives any
    }

    struct Leaf: Decodable {
        let name: String
        let shape: [Int]
        let dtype: String
        let fill: Int
    }

    let format: String
    let version: Int
    let mlx: String
    let file: String
    let weights: String  // a fingerprint
    let chunk: Int
    let eos: [Int]
    let functions: [String: Function]
    let state: [Leaf]

    static func read(_ folder: URL) throws -> Manifest {
        let url = folder.appending(path: "manifest.json")
        let manifest: Manifest
        do {
            manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: url))
        } catch {
            throw BMojoError("\(url.path): \(error)")
        }
        guard manifest.format == "bmojo-edge mlxfn", manifest.version == 1 else {
            throw BMojoError("\(url.path): is \(manifest.format) version \(manifest.version), not bmojo-edge mlxfn version 1")
        }
        return manifest
    }
}
