// A question, pictures and the turns before -> the token ids around the pictures, as the manifest
// says that the family writes them.

import Foundation

struct Prompt: Sendable {
    let ends: Set<Int>
    private let chat: Manifest.Chat?
    private let single: Manifest.Prompt
    private let start: String

    /// Raises EdgeVLMError for a bundle without a prompt, and for instructions where the family
    /// takes none.
    init(_ manifest: Manifest, system: String?) throws {
        guard let prompt = manifest.prompt else {
            throw EdgeVLMError(
                "the bundle has no prompt: this model writes pictures as only its own code can",
                otherFamily)
        }
        single = prompt
        chat = prompt.chat
        ends = Set(manifest.tokens.eos)
        guard let system else {
            start = prompt.chat?.start ?? ""
            return
        }
        guard let around = prompt.chat?.system, around.count == 2 else {
            throw EdgeVLMError(
                "this model takes no instructions of an app's own", "leave the system prompt out")
        }
        try Self.refuse(prompt.specialTokens, in: system, "the system prompt")
        start = around[0] + system + around[1]
    }

    /// The question without white space around it.
    ///
    /// Raises EdgeVLMError for one that says nothing, or has the chat's own tokens in it.
    func checked(_ question: String) throws -> String {
        let words = question.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !words.isEmpty else {
            throw EdgeVLMError("the question is empty", "ask something")
        }
        try Self.refuse(single.specialTokens, in: words, "the question")
        return words
    }

    private static func refuse(_ tokens: [String], in text: String, _ name: String) throws {
        if let token = tokens.first(where: { text.contains($0) }) {
            throw EdgeVLMError("\(name) has the chat's own \(token) in it", "take it out")
        }
    }

    /// Ids before, between and after the pictures, one stretch more than there are pictures.
    func parts(
        _ words: String, pictures: Int, first: Bool, encode: (String) -> [Int]
    ) throws -> [[Int]] {
        guard let chat else {
            guard first, pictures == 1 else {
                throw EdgeVLMError(
                    "this model takes one question about one picture",
                    "begin a new conversation with a picture")
            }
            let text = single.beforeQuestion + words + single.afterQuestion
            return [single.beforeImage, single.afterImage + encode(text)]
        }
        var text = first ? start : chat.afterAnswer
        var parts: [[Int]] = []
        for _ in 0..<pictures {
            parts.append(encode(text))
            text = chat.afterPicture
        }
        parts.append(encode(text + words + chat.afterQuestion))
        if first { parts[0] = chat.bos + parts[0] }
        return parts
    }
}
