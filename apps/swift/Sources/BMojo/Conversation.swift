// A conversation: text in, text out as it is written, its state kept in memory or in a file.

import Foundation
import MLX
import Tokenizers

public struct Turn: Codable, Identifiable, Sendable {
    public var id = UUID()
    public let role: String  // "user" or "assistant"
    public var text: String
}

public actor Conversation {
    public private(set) var turns: [Turn] = []

    private let model: Model
    private let tokenizer: any Tokenizer
    private var state: State
    private var heard: [Int] = []  // the tokens the state has read

    /// Opens an export folder.
    public init(model folder: URL) async throws {
        tokenizer = try await AutoTokenizer.from(modelFolder: folder, strict: false)
        let model = try Model(folder)
        state = try model.freshState()
        self.model = model
    }

    /// The answer to a message, piece by piece. Ending the iteration stops it; what was written stays.
    public nonisolated func answer(to message: String, maxTokens: Int = 512) -> AsyncThrowingStream<String, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.write(message, maxTokens) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func write(_ message: String, _ maxTokens: Int, _ say: @Sendable (String) -> Void) throws {
        turns.append(Turn(role: "user", text: message))
        var logits: MLXArray
        do {
            let messages: [Message] = turns.map { ["role": $0.role, "content": $0.text] }
            logits = try read(tokenizer.applyChatTemplate(messages: messages))
        } catch {
            turns.removeLast()  // nothing was said
            throw error
        }
        var written: [Int] = []
        var text = ""
        defer { turns.append(Turn(role: "assistant", text: text)) }
        while written.count < maxTokens, !Task.isCancelled {
            let token = logits.argMax(axis: -1).item(Int.self)
            if model.manifest.eos.contains(token) { break }
            written.append(token)
            let whole = tokenizer.decode(tokens: written, skipSpecialTokens: true)
            if !whole.hasSuffix("\u{FFFD}"), whole.hasPrefix(text) {  // else a character is not complete yet
                say(String(whole.dropFirst(text.count)))
                text = whole
            }
            logits = try model.read([token], &state)
            heard.append(token)
        }
    }

    /// Reads what a conversation has beyond what was read of it; all of it where it is not the same any more.
    private func read(_ tokens: [Int]) throws -> MLXArray {
        if tokens.count <= heard.count || !tokens.starts(with: heard) {
            state = try model.freshState()
            heard = []
        }
        do {
            let logits = try model.read(Array(tokens[heard.count...]), &state)
            heard = tokens
            return logits
        } catch {  // the state has read a part that nobody counted
            state = try model.freshState()
            heard = []
            throw error
        }
    }

    // MARK: - files

    /// Saves the state and the turns to a .safetensors file.
    public func save(to url: URL) throws {
        let words = String(decoding: try JSONEncoder().encode(turns), as: UTF8.self)
        let ids = MLXArray(heard.map { Int32($0) }, [heard.count])
        try model.save(state, to: url, arrays: ["heard": ids], words: ["turns": words])
    }

    /// Goes on with a conversation that was saved: nothing of it is read again.
    public func load(_ url: URL) throws {
        let found = try model.load(url)
        guard let ids = found.arrays["heard"], let words = found.words["turns"] else {
            throw BMojoError("\(url.path): holds no conversation")
        }
        let said = try JSONDecoder().decode([Turn].self, from: Data(words.utf8))
        let tokens = ids.asArray(Int32.self).map { Int($0) }
        guard tokens.count == found.state.position else {
            throw BMojoError("\(url.path): is damaged: \(tokens.count) tokens at position \(found.state.position)")
        }
        (state, heard, turns) = (found.state, tokens, said)
    }
}
