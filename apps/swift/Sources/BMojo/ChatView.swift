// A page to talk on, for an app on iOS or macOS: `WindowGroup { ChatView(model: folder, saved: file) }`.

import SwiftUI

public struct ChatView: View {
    private let folder: URL
    private let file: URL
    @State private var conversation: Conversation?
    @State private var turns: [Turn] = []
    @State private var message = ""
    @State private var problem: String?
    @State private var writing: Task<Void, Never>?

    /// model: an export folder; saved: the .safetensors file in which the conversation is kept.
    public init(model folder: URL, saved file: URL) {
        (self.folder, self.file) = (folder, file)
    }

    public var body: some View {
        VStack(alignment: .leading) {
            ScrollView {
                ForEach(turns) { turn in
                    Text(turn.text)
                        .foregroundStyle(turn.role == "user" ? .secondary : .primary)
                        .frame(maxWidth: .infinity, alignment: .leading)
                        .padding(.vertical, 4)
                }
            }
            if let problem { Text(problem).foregroundStyle(.red) }
            HStack {
                TextField("Message", text: $message).onSubmit(send)
                if writing == nil {
                    Button("Send", action: send).disabled(conversation == nil || message.isEmpty)
                } else {
                    Button("Stop") { writing?.cancel() }
                }
            }
        }
        .padding()
        .task { await open() }
    }

    private func open() async {
        do {
            let opened = try await Conversation(model: folder)
            if FileManager.default.fileExists(atPath: file.path) {
                try await opened.load(file)
            }
            (conversation, turns) = (opened, await opened.turns)
        } catch {
            problem = error.localizedDescription
        }
    }

    private func send() {
        guard let conversation, writing == nil, !message.isEmpty else { return }
        let asked = message
        message = ""
        problem = nil
        turns += [Turn(role: "user", text: asked), Turn(role: "assistant", text: "")]
        writing = Task { @MainActor in
            do {
                for try await piece in conversation.answer(to: asked) {
                    turns[turns.count - 1].text += piece
                }
                try await conversation.save(to: file)
            } catch {
                problem = error.localizedDescription
            }
            writing = nil
        }
    }
}
