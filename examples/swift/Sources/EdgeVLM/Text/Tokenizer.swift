// tokenizer.json of a bundle: text -> token ids, and what a streaming detokenizer needs. BPE, byte
// level or SentencePiece's kind, which is what the families that export have.

import Foundation

public final class Tokenizer: Sendable {
    /// Special and other added tokens, by id.
    let added: [Int: Bytes]
    let special: Set<Int>
    let spelling: Spelling
    private let pairs: BytePairs
    private let raw: [AddedToken]
    private let normalized: [AddedToken]
    private let rules: Rules

    /// What cuts a text, which is not marked Sendable everywhere but never changes.
    private struct Rules: @unchecked Sendable {
        let normalizers: [Normalizer]
        let preTokenizers: [PreTokenizer]
    }

    struct AddedToken: Sendable {
        let id: Int
        let content: Bytes
        let singleWord, stripsLeft, stripsRight: Bool
    }

    /// Raises EdgeVLMError for a file that cannot be read, or a kind that is not known.
    public init(file: URL) throws {
        guard let data = try? Data(contentsOf: file) else {
            throw EdgeVLMError("\(file.path): cannot be read", "copy or export the bundle again")
        }
        let json = try JSONText(Bytes(data))
        rules = Rules(
            normalizers: try Normalizer.steps(json["normalizer"]),
            preTokenizers: try PreTokenizer.steps(json["pre_tokenizer"]))
        pairs = try BytePairs(json["model"])
        var added: [Int: Bytes] = [:]
        var special: Set<Int> = []
        var raw: [AddedToken] = []
        var normalized: [AddedToken] = []
        for entry in json["added_tokens"].items {
            guard let id = entry["id"].int, let content = entry["content"].bytes, !content.isEmpty
            else {
                throw EdgeVLMError("tokenizer.json: a token has no text or id", exportAgain)
            }
            added[id] = content
            if entry["special"].bool { special.insert(id) }
            let token = AddedToken(
                id: id, content: content, singleWord: entry["single_word"].bool,
                stripsLeft: entry["lstrip"].bool, stripsRight: entry["rstrip"].bool)
            if entry["normalized"].bool { normalized.append(token) } else { raw.append(token) }
        }
        // The longest that begins at a place wins.
        self.raw = raw.sorted { $0.content.count > $1.content.count }
        self.normalized = normalized.sorted { $0.content.count > $1.content.count }
        self.added = added
        self.special = special
        spelling = try Spelling(json["decoder"])
    }

    /// Token ids of a text; special tokens that are written in it count, and none is added.
    public func encode(_ text: String) -> [Int] {
        var ids: [Int] = []
        for (place, part) in Self.parts(Bytes(text.utf8), raw).enumerated() {
            switch part {
            case .token(let id): ids.append(id)
            case .text(let bytes):
                var plain = String(decoding: bytes, as: UTF8.self)
                for normalizer in rules.normalizers { plain = normalizer(plain) }
                for (inner, part) in Self.parts(Bytes(plain.utf8), normalized).enumerated() {
                    switch part {
                    case .token(let id): ids.append(id)
                    case .text(let bytes):
                        ids += pieces(bytes, first: place == 0 && inner == 0)
                    }
                }
            }
        }
        return ids
    }

    private func pieces(_ bytes: Bytes, first: Bool) -> [Int] {
        var pieces = [String(decoding: bytes, as: UTF8.self)]
        for step in rules.preTokenizers {
            pieces = pieces.enumerated().flatMap { place, piece in
                step(piece, first: first && place == 0)
            }
        }
        return pieces.flatMap { pairs.ids(Bytes($0.utf8)) }
    }

    /// The text of a token in the vocabulary.
    func content(_ id: Int) -> Bytes? { pairs.content(id) }

    /// A detokenizer for one answer.
    public func detokenizer() -> Detokenizer { Detokenizer(self) }

    /// The text of ids, special tokens left out.
    public func decode(_ ids: [Int]) -> String {
        var detokenizer = detokenizer()
        return ids.reduce(into: "") { $0 += detokenizer.add($1) } + detokenizer.finish()
    }

    private enum Part {
        case text(Bytes)
        case token(Int)
    }

    /// A text cut at added tokens, the leftmost first and the longest of those that begin there.
    private static func parts(_ bytes: Bytes, _ tokens: [AddedToken]) -> [Part] {
        if tokens.isEmpty { return bytes.isEmpty ? [] : [.text(bytes)] }
        let firsts = Set(tokens.compactMap(\.content.first))
        var parts: [Part] = []
        var start = 0
        var place = 0
        while place < bytes.count {
            let rest = bytes[place...]
            guard firsts.contains(bytes[place]),
                let token = tokens.first(where: {
                    rest.starts(with: $0.content) && alone($0, bytes, place)
                })
            else {
                place += 1
                continue
            }
            var text = bytes[start..<place]
            while token.stripsLeft, let last = text.last, isSpace(last) { text.removeLast() }
            if !text.isEmpty { parts.append(.text(Bytes(text))) }
            parts.append(.token(token.id))
            place += token.content.count
            while token.stripsRight, place < bytes.count, isSpace(bytes[place]) { place += 1 }
            start = place
        }
        if start < bytes.count { parts.append(.text(Bytes(bytes[start...]))) }
        return parts
    }

    private static func isSpace(_ byte: UInt8) -> Bool { byte == 0x20 || 0x09...0x0D ~= byte }

    /// Whether a token that only counts as a whole word is one.
    private static func alone(_ token: AddedToken, _ bytes: Bytes, _ place: Int) -> Bool {
        guard token.singleWord else { return true }
        let end = place + token.content.count
        let letter = { (byte: UInt8) in
            byte >= 0x80 || byte == UInt8(ascii: "_") || 0x30...0x39 ~= byte
                || 0x41...0x5A ~= byte || 0x61...0x7A ~= byte
        }
        let before = place > 0 && letter(bytes[place - 1])
        return !before && !(end < bytes.count && letter(bytes[end]))
    }
}
