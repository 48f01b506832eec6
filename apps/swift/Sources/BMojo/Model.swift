// An exported model and its state: tokens in, logits out, the same number of bytes for ever. Knows no text.

import Foundation
import MLX

/// Everything a sequence remembers: the arrays in the manifest's order, and how many tokens were read.
struct State {
    var arrays: [MLXArray]
    var position: Int
}

final class Model {
    let manifest: Manifest
    private let functions: Functions

    init(_ folder: URL) throws {
        manifest = try Manifest.read(folder)
        functions = try Functions(folder.appending(path: manifest.file), madeWith: manifest.mlx)
    }

    func freshState() throws -> State {
        let arrays = try manifest.state.map { leaf in
            try MLXArray.full(leaf.shape, values: MLXArray(leaf.fill), dtype: dtype(leaf))
        }
        return State(arrays: arrays, position: 0)
    }

    /// Logits (1, v) of the last of some tokens, at least one; the state moves on.
    ///
    /// A chunk that is there as a whole goes through `prefill`, other tokens one by one through `decode`, with `commit`
    /// before the first of a chunk.
    func read(_ tokens: [Int], _ state: inout State) throws -> MLXArray {
        precondition(!tokens.isEmpty)
        var logits = MLXArray(0)
        var next = 0
        while next < tokens.count {
            try Task.checkCancellation()
            let begins = state.position % manifest.chunk == 0
            let whole = begins && has("prefill") && next + manifest.chunk <= tokens.count
            let size = whole ? manifest.chunk : 1
            if begins && !whole && has("commit") {
                state.arrays = try functions(state.arrays)
            }
            let block = MLXArray(tokens[next ..< next + size].map { Int32($0) }, [1, size])
            // Nothing holds the old arrays when the new ones are computed: rings are then written where they are.
            state.arrays = try functions([block] + state.arrays)
            logits = state.arrays.removeFirst()
            try checkedEval([logits] + state.arrays)
            state.position += size
            next += size
        }
        return logits
    }

    // MARK: - files

    /// Writes a state, with further arrays and words; the file takes its name when it is complete.
    func save(_ state: State, to url: URL, arrays more: [String: MLXArray], words: [String: String]) throws {
        let names = manifest.state.map(\.name)
        let own = Dictionary(uniqueKeysWithValues: zip(names, state.arrays))
        let partial = url.deletingPathExtension().appendingPathExtension("partial.safetensors")
        let metadata = words.merging(["weights": manifest.weights]) { _, new in new }
        try MLX.save(arrays: own.merging(more) { _, new in new }, metadata: metadata, url: partial)
        if FileManager.default.fileExists(atPath: url.path) {
            _ = try FileManager.default.replaceItemAt(url, withItemAt: partial)
        } else {
            try FileManager.default.moveItem(at: partial, to: url)
        }
    }

    /// A state that was saved, with the further arrays and words.
    func load(_ url: URL) throws -> (state: State, arrays: [String: MLXArray], words: [String: String]) {
        guard FileManager.default.fileExists(atPath: url.path) else {
            throw BMojoError("\(url.path): file is missing")
        }
        let (found, words) = try loadArraysAndMetadata(url: url)
        guard words["weights"] == manifest.weights else {
            throw BMojoError("\(url.path): was saved with another model")
        }
        let arrays = try manifest.state.map { leaf in
            let wanted = try dtype(leaf)
            guard let array = found[leaf.name], array.shape == leaf.shape, array.dtype == wanted else {
                throw BMojoError("\(url.path): \(leaf.name): is missing or of another shape")
            }
            return array
        }
        guard let at = manifest.state.firstIndex(where: { $0.name == "position" }) else {
            throw BMojoError("manifest.json: state: has no position")
        }
        try checkedEval(arrays)
        let position = arrays[at].item(Int.self)
        return (State(arrays: arrays, position: position), found, words)
    }

    private func has(_ name: String) -> Bool { manifest.functions[name] != nil }

    private func dtype(_ leaf: Manifest.Leaf) throws -> DType {
        switch leaf.dtype {
        case "float32": .float32
        case "float16": .float16
        case "bfloat16": .bfloat16
        case "int64": .int64
        default: throw BMojoError("manifest.json: state: \(leaf.name): unknown dtype \(leaf.dtype)")
        }
    }
}
