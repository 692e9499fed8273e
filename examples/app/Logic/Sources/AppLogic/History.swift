// What was said -> a file, and back when the app is opened again.

import Foundation

public struct History: Sendable {
    private let file: URL
    /// Messages that stay, the newest.
    public static let most = 200

    private struct Content: Codable {
        var format = 1
        let messages: [Message]
    }

    public init(file: URL) { self.file = file }

    /// What was saved last; nothing where that cannot be read.
    public var messages: [Message] {
        guard let data = try? Data(contentsOf: file),
            let content = try? JSONDecoder().decode(Content.self, from: data), content.format == 1
        else { return [] }
        return content.messages
    }

    /// Pictures are not saved, only how many there were. A full storage is not worth a word here:
    /// what was saved before stays.
    public func save(_ messages: [Message]) {
        guard let data = try? JSONEncoder().encode(Content(messages: messages.suffix(Self.most)))
        else { return }
        try? data.write(to: file, options: .atomic)
    }
}
