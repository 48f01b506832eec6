// bmojo-chat MODEL [SESSION.safetensors]: talks on the terminal and keeps the conversation in a file.

import BMojo
import Foundation

let words = CommandLine.arguments.dropFirst().map { URL(fileURLWithPath: $0) }
guard let folder = words.first, words.count <= 2 else {
    FileHandle.standardError.write(Data("usage: bmojo-chat MODEL [SESSION.safetensors]\n".utf8))
    exit(2)
}
let file = words.count == 2 ? words[1] : nil

do {
    let conversation = try await Conversation(model: folder)
    if let file, FileManager.default.fileExists(atPath: file.path) {
        try await conversation.load(file)
    }
    while true {
        print("> ", terminator: "")
        fflush(stdout)
        guard let message = readLine() else { break }
        if message.isEmpty { continue }
        for try await piece in conversation.answer(to: message) {
            print(piece, terminator: "")
            fflush(stdout)
        }
        print()
        if let file { try await conversation.save(to: file) }
    }
} catch {
    FileHandle.standardError.write(Data("error: \(error.localizedDescription)\n".utf8))
    exit(1)
}
