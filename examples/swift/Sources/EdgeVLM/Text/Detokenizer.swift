// Token ids, one at a time -> text in whole characters. What is said piece by piece and `finish()`
// together are the text of all ids: nothing is lost where an answer ends within a run of bytes.

import Foundation

/// How ids spell text, by tokenizer.json's "decoder".
enum Spelling: Sendable {
    case byteLevel
    /// Marks are spaces, <0xE2> a byte; the first space goes where `strips`.
    case marked(mark: Bytes, strips: Bool)

    init(_ json: JSONText) throws {
        let kind = json["type"].text ?? ""
        switch kind {
        case "ByteLevel": self = .byteLevel
        case "Metaspace":
            let mark = json["replacement"].bytes ?? Bytes("\u{2581}".utf8)
            let never = json["prepend_scheme"].text == "never"
            self = .marked(mark: mark, strips: !never)
        case "Sequence":
            var mark = Bytes("\u{2581}".utf8)
            var strips = false
            for step in json["decoders"].items {
                let kind = step["type"].text ?? ""
                switch kind {
                case "Replace": mark = step["pattern"]["String"].bytes ?? mark
                case "ByteFallback", "Fuse": break
                case "Strip": strips = step["start"].int == 1
                default: throw notKnown("decoder", kind)
                }
            }
            self = .marked(mark: mark, strips: strips)
        default: throw notKnown("decoder", kind)
        }
    }
}

public struct Detokenizer {
    private let tokenizer: Tokenizer
    /// Bytes that may go on: the beginning of a character, or a run of byte tokens.
    private var waiting = Bytes()
    private var began = false

    init(_ tokenizer: Tokenizer) { self.tokenizer = tokenizer }

    /// The characters that a token completes, maybe none. Special tokens have no text.
    public mutating func add(_ id: Int) -> String {
        if tokenizer.special.contains(id) { return "" }
        switch tokenizer.spelling {
        case .byteLevel: return addBytes(bytes(id))
        case .marked(let mark, let strips):
            let content = tokenizer.added[id] ?? tokenizer.content(id) ?? []
            if let byte = Self.byte(content) {
                waiting.append(byte)
                return ""
            }
            return begin(finish() + spaced(content, mark), strips)
        }
    }

    /// What is left at the end; half a character becomes U+FFFD.
    public mutating func finish() -> String {
        defer { waiting = [] }
        guard !waiting.isEmpty else { return "" }
        if case .marked(_, let strips) = tokenizer.spelling {
            // A run that is no UTF-8 is one U+FFFD for each of its bytes.
            let text = String(validating: waiting, as: UTF8.self)
            let replaced = String(repeating: "\u{FFFD}", count: waiting.count)
            return begin(text ?? replaced, strips)
        }
        return String(decoding: waiting, as: UTF8.self)
    }

    private func bytes(_ id: Int) -> Bytes {
        if let literal = tokenizer.added[id] { return literal }
        let content = tokenizer.content(id) ?? []
        return ByteAlphabet.bytes(of: String(decoding: content, as: UTF8.self)) ?? content
    }

    private mutating func addBytes(_ bytes: Bytes) -> String {
        waiting += bytes
        let whole = waiting.count - Self.unfinished(waiting)
        defer { waiting.removeFirst(whole) }
        return String(decoding: waiting[..<whole], as: UTF8.self)
    }

    private func spaced(_ content: Bytes, _ mark: Bytes) -> String {
        String(decoding: replacing(content, mark, [0x20]), as: UTF8.self)
    }

    private mutating func begin(_ text: String, _ strips: Bool) -> String {
        guard !began, !text.isEmpty else { return text }
        began = true
        return strips && text.utf8.first == 0x20 ? String(text.unicodeScalars.dropFirst()) : text
    }

    /// 0xE2 of "<0xE2>".
    private static func byte(_ content: Bytes) -> UInt8? {
        guard content.count == 6, content.starts(with: Bytes("<0x".utf8)), content[5] == 0x3E else {
            return nil
        }
        return UInt8(String(decoding: content[3..<5], as: UTF8.self), radix: 16)
    }

    /// Bytes of the character that a byte begins, 0 where it begins none.
    private static func length(_ first: UInt8) -> Int {
        switch first {
        case 0..<0x80: return 1
        case 0xC2..<0xE0: return 2
        case 0xE0..<0xF0: return 3
        case 0xF0..<0xF5: return 4
        default: return 0
        }
    }

    /// How many bytes at the end are the beginning of a character that may still be completed.
    static func unfinished(_ bytes: Bytes) -> Int {
        for back in 1...3 where back <= bytes.count {
            let tail = bytes[(bytes.count - back)...]
            guard let first = tail.first else { return 0 }
            if first & 0xC0 == 0x80 { continue }
            guard back < length(first) else { return 0 }
            guard back > 1, let second = tail.dropFirst().first else { return back }
            // The second byte's range depends on the first (Unicode, table 3-7).
            let low: UInt8 = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80
            let high: UInt8 = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF
            return low...high ~= second ? back : 0
        }
        return 0
    }
}

/// Cuts streamed text at the first stop string to be completed. What may be the beginning of one is
/// held back until that is decided, so that none is shown, not even in part.
struct StopStrings {
    private let words: [Bytes]
    private var held = Bytes()
    private(set) var matched: String?

    init(_ words: [String]) { self.words = words.map { Bytes($0.utf8) }.filter { !$0.isEmpty } }

    /// What is safe to show; nothing after the stop.
    mutating func feed(_ text: String) -> String {
        if matched != nil { return "" }
        let bytes = held + Bytes(text.utf8)
        var first: (end: Int, start: Int, word: Bytes)?
        for word in words {
            if let start = Self.place(of: word, in: bytes) {
                let end = start + word.count
                if first.map({ (end, start) < ($0.end, $0.start) }) ?? true {
                    first = (end, start, word)
                }
            }
        }
        if let first {
            matched = String(decoding: first.word, as: UTF8.self)
            held = []
            return String(decoding: bytes[..<first.start], as: UTF8.self)
        }
        let kept = beginning(bytes)
        held = Bytes(bytes.suffix(kept))
        return String(decoding: bytes.dropLast(kept), as: UTF8.self)
    }

    /// What is still held back, at the end.
    mutating func flush() -> String {
        defer { held = [] }
        return String(decoding: held, as: UTF8.self)
    }

    private static func place(of word: Bytes, in bytes: Bytes) -> Int? {
        guard bytes.count >= word.count else { return nil }
        return (0...bytes.count - word.count).first { bytes[$0...].starts(with: word) }
    }

    /// The length of the longest end that a stop string begins with.
    private func beginning(_ bytes: Bytes) -> Int {
        let longest = min((words.map(\.count).max() ?? 1) - 1, bytes.count)
        guard longest > 0 else { return 0 }
        return (1...longest).reversed().first { length in
            let tail = bytes.suffix(length)
            return words.contains { $0.count > length && $0.starts(with: tail) }
        } ?? 0
    }
}
