// Runs a Core ML export on a Mac and compares its logits with those recorded when it was made; in Python: selftest.py.
//
//     swiftc -O apps/coreml/SelfTest.swift -o SelfTest        # macOS 15 or newer, Xcode 16 or newer
//     ./SelfTest DIR                                          # DIR: what `bmojo-edge export coreml` wrote
//     ./SelfTest DIR cpu                                      # or all, gpu (and CPU), ane (and CPU)
//
// Not yet compiled or run: it was written without Apple hardware, after the Python driver, which is tested.

import CoreML
import Foundation

struct Manifest: Decodable {
    struct Cycle: Decodable { let base: Int; let period: Int }
    struct Function: Decodable { let inputs: [String]; let outputs: [String] }
    struct Leaf: Decodable { let name: String; let kind: String; let shape: [Int]; let fill: Double }
    struct Recorded: Decodable { let file: String; let bound: Double }

    let package: String
    let chunk: Int
    let position: Cycle
    let turns: [String]?
    let functions: [String: Function]
    let state: [Leaf]
    let self_test: Recorded
}

struct Failure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

/// The arrays of a safetensors file: 8 bytes of length, a header in JSON, the values.
struct Safetensors {
    struct Entry { let shape: [Int]; let start: Int }

    let data: Data
    var entries: [String: Entry] = [:]

    init(_ url: URL) throws {
        data = try Data(contentsOf: url)
        let length = Int(data.withUnsafeBytes { $0.loadUnaligned(as: UInt64.self) })
        let header = try JSONSerialization.jsonObject(with: data.subdata(in: 8..<8 + length))
        guard let found = header as? [String: Any] else { throw Failure("\(url.path): no safetensors header") }
        for (name, value) in found {
            guard let entry = value as? [String: Any], let shape = entry["shape"] as? [Int],
                let offsets = entry["data_offsets"] as? [Int]
            else { continue }
            entries[name] = Entry(shape: shape, start: 8 + length + offsets[0])
        }
    }

    func values<T>(_ name: String, as type: T.Type) throws -> [T] {
        guard let entry = entries[name] else { throw Failure("self-test: \(name) is missing") }
        let count = entry.shape.reduce(1, *)
        return data.withUnsafeBytes { bytes in
            (0..<count).map {
                bytes.loadUnaligned(fromByteOffset: entry.start + $0 * MemoryLayout<T>.stride, as: type)
            }
        }
    }
}

func array(_ shape: [Int], _ type: MLMultiArrayDataType, _ value: (Int) -> NSNumber) throws -> MLMultiArray {
    let made = try MLMultiArray(shape: shape as [NSNumber], dataType: type)
    for i in 0..<made.count { made[i] = value(i) }
    return made
}

/// Sets every element by its indices, which respects strides that Core ML chose.
func fill(_ array: MLMultiArray, with value: Double) {
    let shape = array.shape.map(\.intValue)
    for flat in 0..<array.count {
        var rest = flat
        var index = [NSNumber](repeating: 0, count: shape.count)
        for axis in shape.indices.reversed() {
            index[axis] = NSNumber(value: rest % shape[axis])
            rest /= shape[axis]
        }
        array[index] = NSNumber(value: value)
    }
}

/// One sequence through a package, by its manifest (docs/export.md).
final class Driver {
    let manifest: Manifest
    let models: [String: MLModel]
    let state: MLState  // one for all functions
    var wide: [String: MLMultiArray] = [:]  // the part of the state that is float32, given and returned
    var position = 0

    init(_ manifest: Manifest, _ models: [String: MLModel]) throws {
        guard let decode = models["decode"] else { throw Failure("manifest: there is no function decode") }
        self.manifest = manifest
        self.models = models
        state = decode.makeState()
        for leaf in manifest.state {
            if leaf.kind == "input" {
                wide[leaf.name] = try array(leaf.shape, .float32) { _ in NSNumber(value: Float(leaf.fill)) }
            } else if leaf.fill != 0 {  // Core ML makes states of zeros
                state.withMultiArray(for: leaf.name) { fill($0, with: leaf.fill) }
            }
        }
    }

    /// The position as functions take it: it never outgrows int32.
    private var told: Int {
        let cycle = manifest.position
        return position < cycle.base ? position : cycle.base + (position - cycle.base) % cycle.period
    }

    /// Cosines and sines of the true position: a product modulo 2^64, the fraction of a turn.
    private func angles(_ size: Int) throws -> [String: MLMultiArray] {
        guard let turns = manifest.turns else { return [:] }
        let parsed = turns.compactMap(UInt64.init)
        guard parsed.count == turns.count else { throw Failure("manifest: turns are no unsigned integers") }
        let found = (0..<size).flatMap { t in
            parsed.map { turn in
                Double(Int64(bitPattern: UInt64(position + t) &* turn)) * (2 * Double.pi / 18_446_744_073_709_551_616)
            }
        }
        let shape = [1, size, parsed.count]
        return [
            "cos": try array(shape, .float32) { NSNumber(value: Float(cos(found[$0]))) },
            "sin": try array(shape, .float32) { NSNumber(value: Float(sin(found[$0]))) },
        ]
    }

    private func call(_ function: String, _ tokens: [Int32]?) throws -> MLFeatureProvider {
        guard let model = models[function], let described = manifest.functions[function] else {
            throw Failure("manifest: there is no function \(function)")
        }
        var given = try angles(tokens?.count ?? 1)
        given["position"] = try array([1], .int32) { _ in NSNumber(value: told) }
        if let tokens {
            given["tokens"] = try array([1, tokens.count], .int32) { NSNumber(value: tokens[$0]) }
            given.merge(wide) { _, new in new }
        }
        let wanted = given.filter { described.inputs.contains($0.key) }
        let provider = try MLDictionaryFeatureProvider(dictionary: wanted.mapValues { MLFeatureValue(multiArray: $0) })
        return try model.prediction(from: provider, using: state)
    }

    private func output(_ found: MLFeatureProvider, _ name: String) throws -> MLMultiArray {
        guard let value = found.featureValue(for: name)?.multiArrayValue else { throw Failure("no output \(name)") }
        return value
    }

    /// Logits after one token, or after a whole chunk, which starts where position is a multiple of it.
    func feed(_ tokens: [Int32]) throws -> [Float] {
        if position % manifest.chunk == 0, manifest.functions["commit"] != nil { _ = try call("commit", nil) }
        let found = try call(tokens.count == 1 ? "decode" : "prefill", tokens)
        for name in wide.keys { wide[name] = try output(found, "new_" + name) }
        position += tokens.count
        return MLShapedArray<Float>(converting: try output(found, "logits")).scalars
    }
}

func ratio(_ got: ArraySlice<Float>, _ wanted: ArraySlice<Float>) -> Double {
    var error = 0.0
    var size = 0.0
    for (x, y) in zip(got, wanted) {
        error += pow(Double(x) - Double(y), 2)
        size += pow(Double(y), 2)
    }
    let found = (error / size).squareRoot()
    return found.isFinite ? found : .infinity
}

func top(_ logits: ArraySlice<Float>) -> Int {
    logits.indices.max { logits[$0] < logits[$1] }.map { $0 - logits.startIndex } ?? -1
}

func load(_ folder: URL, _ manifest: Manifest, _ units: MLComputeUnits) throws -> [String: MLModel] {
    let compiled = try MLModel.compileModel(at: folder.appendingPathComponent(manifest.package))
    return try Dictionary(
        uniqueKeysWithValues: manifest.functions.keys.map { name in
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            configuration.functionName = name
            return (name, try MLModel(contentsOf: compiled, configuration: configuration))
        })
}

/// Feeds the recorded tokens, whole chunks where nothing inside one was recorded, and compares: true = passed.
func run(_ folder: URL, _ units: MLComputeUnits) throws -> Bool {
    let manifest = try JSONDecoder().decode(
        Manifest.self, from: Data(contentsOf: folder.appendingPathComponent("manifest.json")))
    let recorded = try Safetensors(folder.appendingPathComponent(manifest.self_test.file))
    let tokens = try recorded.values("tokens", as: Int32.self)
    let positions = try recorded.values("positions", as: Int64.self).map(Int.init)
    let wanted = try recorded.values("logits", as: Float.self)
    let width = wanted.count / positions.count
    let driver = try Driver(manifest, load(folder, manifest, units))
    let chunk = manifest.chunk
    var got: [Float] = []
    var times: [String: [Double]] = ["decode": [], "prefill": []]
    while driver.position < tokens.count {
        let at = driver.position
        let inside = positions.contains { at <= $0 && $0 < at + chunk - 1 }
        let size = at % chunk == 0 && at + chunk <= tokens.count && !inside ? chunk : 1
        let start = Date()
        let logits = try driver.feed(Array(tokens[at..<at + size]))
        times[size == 1 ? "decode" : "prefill"]?.append(Date().timeIntervalSince(start))
        if positions.contains(at + size - 1) { got += logits }
    }
    var same = 0
    for (n, position) in positions.enumerated() {
        let span = n * width..<(n + 1) * width
        same += top(got[span]) == top(wanted[span]) ? 1 : 0
        print("position \(position): RMS ratio", String(format: "%.2e", ratio(got[span], wanted[span])))
    }
    for (name, found) in times.sorted(by: { $0.key < $1.key }) where !found.isEmpty {
        print(String(format: "%@: %.1f ms a call", name, 1000 * found.sorted()[found.count / 2]))
    }
    print("likeliest token as recorded: \(same) of \(positions.count)")
    let overall = ratio(got[...], wanted[...])
    let passed = overall < manifest.self_test.bound
    print(passed ? "PASS:" : "FAIL:", String(format: "RMS ratio %.2e, bound %.0e", overall, manifest.self_test.bound))
    return passed
}

let units: [String: MLComputeUnits] = [
    "all": .all, "cpu": .cpuOnly, "gpu": .cpuAndGPU, "ane": .cpuAndNeuralEngine,
]
let arguments = Array(CommandLine.arguments.dropFirst())
guard let folder = arguments.first, let chosen = units[arguments.count > 1 ? arguments[1] : "all"] else {
    print("usage: SelfTest DIR [all|cpu|gpu|ane]")
    exit(2)
}
do {
    exit(try run(URL(fileURLWithPath: folder), chosen) ? 0 : 1)
} catch {
    print("error: \(error)")
    exit(2)
}
