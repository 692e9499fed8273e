// A stretch of text without special tokens -> normalised, then cut into the pieces within which
// tokens are merged. As Hugging Face's `tokenizers` does it for what tokenizer.json names.

import Foundation

/// A step of tokenizer.json's "normalizer".
enum Normalizer {
    case compose, composeCompatibly
    case prepend(String)
    case replace(Bytes, with: Bytes)

    static func steps(_ json: JSONText) throws -> [Normalizer] {
        if json.isNull { return [] }
        let kind = json["type"].text ?? ""
        switch kind {
        case "Sequence": return try json["normalizers"].items.flatMap(steps)
        case "NFC": return [.compose]
        case "NFKC": return [.composeCompatibly]
        case "Prepend": return [.prepend(json["prepend"].text ?? "")]
        case "Replace":
            if let pattern = json["pattern"]["String"].bytes, let content = json["content"].bytes {
                return [.replace(pattern, with: content)]
            }
        default: break
        }
        throw notKnown("normalizer", kind)
    }

    func callAsFunction(_ text: String) -> String {
        switch self {
        case .compose: return text.precomposedStringWithCanonicalMapping
        case .composeCompatibly: return text.precomposedStringWithCompatibilityMapping
        case .prepend(let mark): return text.isEmpty ? text : mark + text
        case .replace(let old, let new):
            return String(decoding: replacing(Bytes(text.utf8), old, new), as: UTF8.self)
        }
    }
}

/// What to say of a part of tokenizer.json that this code does not have.
func notKnown(_ part: String, _ kind: String) -> EdgeVLMError {
    EdgeVLMError(
        "tokenizer.json: a \(part) of the kind \(kind.isEmpty ? "?" : kind) is not known",
        "use a model with a byte-level or SentencePiece BPE tokenizer, or add it to EdgeVLM")
}

/// Every `old` in the bytes, from the left, as `new`.
func replacing(_ bytes: Bytes, _ old: Bytes, _ new: Bytes) -> Bytes {
    guard let first = old.first, bytes.contains(first) else { return bytes }
    var out = Bytes()
    var place = 0
    while place < bytes.count {
        if bytes[place] == first, bytes[place...].starts(with: old) {
            out += new
            place += old.count
        } else {
            out.append(bytes[place])
            place += 1
        }
    }
    return out
}

/// A step of tokenizer.json's "pre_tokenizer".
enum PreTokenizer {
    /// Matches stand by themselves; with `inverted` what is between them does.
    case split(NSRegularExpression, inverted: Bool, removed: Bool)
    case digits(each: Bool)
    /// Text -> the letters that stand for its bytes, a space before it where asked for.
    case byteLevel(prefixSpace: Bool, NSRegularExpression?)
    /// Spaces -> a mark, which stands before a text too. scheme: always, first or never.
    case metaspace(mark: String, scheme: String, split: Bool)

    static let space = #"[\t\n\u000B\f\r\u0085\p{Z}]"#
    static let gpt2 =
        #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

    static func steps(_ json: JSONText) throws -> [PreTokenizer] {
        if json.isNull { return [] }
        let kind = json["type"].text ?? ""
        switch kind {
        case "Sequence": return try json["pretokenizers"].items.flatMap(steps)
        case "Split": return [try split(json)]
        case "Digits": return [.digits(each: json["individual_digits"].bool)]
        case "ByteLevel":
            // Left out, use_regex is true.
            let plain = !json["use_regex"].isNull && !json["use_regex"].bool
            return [
                .byteLevel(
                    prefixSpace: json["add_prefix_space"].bool, plain ? nil : try regex(gpt2))
            ]
        case "Metaspace":
            let scheme = json["prepend_scheme"].text
            let older = json["add_prefix_space"].bool ? "always" : "never"
            let whole = !json["split"].isNull && !json["split"].bool
            return [
                .metaspace(
                    mark: json["replacement"].text ?? "\u{2581}", scheme: scheme ?? older,
                    split: !whole)
            ]
        default: throw notKnown("pre-tokenizer", kind)
        }
    }

    private static func split(_ json: JSONText) throws -> PreTokenizer {
        let behavior = json["behavior"].text ?? ""
        guard ["Isolated", "Removed"].contains(behavior) else {
            throw notKnown("split", behavior)
        }
        let literal = json["pattern"]["String"].text.map(NSRegularExpression.escapedPattern)
        let pattern = literal ?? json["pattern"]["Regex"].text ?? ""
        return .split(
            try regex(pattern), inverted: json["invert"].bool, removed: behavior == "Removed")
    }

    /// A pattern of Oniguruma's, whose white space is Unicode's, for ICU, whose is not.
    static func regex(_ pattern: String) throws -> NSRegularExpression {
        let none = "[^" + space.dropFirst()
        let known = pattern.replacingOccurrences(of: #"\s"#, with: space)
            .replacingOccurrences(of: #"\S"#, with: none)
        do {
            return try NSRegularExpression(pattern: known)
        } catch {
            throw notKnown("pattern", pattern)
        }
    }

    /// first: whether a text begins here, and not behind a special token.
    func callAsFunction(_ text: String, first: Bool) -> [String] {
        switch self {
        case .split(let pattern, let inverted, let removed):
            let pieces = cut(text, pattern)
            return pieces.filter { !(removed && $0.matched != inverted) }.map(\.text)
        case .digits(let each): return Self.digits(text, each)
        case .byteLevel(let prefixSpace, let pattern):
            let spaced = prefixSpace && text.unicodeScalars.first != " " ? " " + text : text
            let pieces = pattern.map { cut(spaced, $0).map(\.text) } ?? [spaced]
            return pieces.map { ByteAlphabet.text(of: Bytes($0.utf8)) }
        case .metaspace(let mark, let scheme, let split):
            let marks = Bytes(mark.utf8)
            var bytes = replacing(Bytes(text.utf8), [0x20], marks)
            let wanted = scheme == "always" || (scheme == "first" && first)
            if wanted, !bytes.starts(with: marks) {
                bytes = marks + bytes
            }
            guard split else { return [String(decoding: bytes, as: UTF8.self)] }
            return Self.before(marks, bytes).map { String(decoding: $0, as: UTF8.self) }
        }
    }

    /// Cut before every mark.
    private static func before(_ mark: Bytes, _ bytes: Bytes) -> [ArraySlice<UInt8>] {
        var pieces: [ArraySlice<UInt8>] = []
        var start = 0
        for place in bytes.indices.dropFirst() where bytes[place...].starts(with: mark) {
            pieces.append(bytes[start..<place])
            start = place
        }
        return start < bytes.count ? pieces + [bytes[start...]] : pieces
    }

    private static func digits(_ text: String, _ each: Bool) -> [String] {
        var pieces: [String] = []
        var last = false
        for scalar in text.unicodeScalars {
            let digit = scalar.properties.numericType != nil
            if pieces.isEmpty || digit != last || (digit && each) {
                pieces.append("")
            }
            pieces[pieces.count - 1].unicodeScalars.append(scalar)
            last = digit
        }
        return pieces
    }
}

/// Matches, and what is between them, in order.
private func cut(
    _ text: String, _ pattern: NSRegularExpression
) -> [(text: String, matched: Bool)] {
    let whole = text as NSString
    var pieces: [(text: String, matched: Bool)] = []
    var end = 0
    for match in pattern.matches(in: text, range: NSRange(location: 0, length: whole.length)) {
        let range = match.range
        if range.length == 0 { continue }
        if range.location > end {
            let gap = NSRange(location: end, length: range.location - end)
            pieces.append((whole.substring(with: gap), false))
        }
        pieces.append((whole.substring(with: range), true))
        end = range.location + range.length
    }
    if end < whole.length {
        pieces.append((whole.substring(from: end), false))
    }
    return pieces
}

/// Byte-level BPE's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 on
/// in order.
enum ByteAlphabet {
    static let letters: [Unicode.Scalar] = {
        let printable = [0x21..<0x7F, 0xA1..<0xAD, 0xAE..<0x100]
        var others = 0
        return (0..<256).map { byte in
            if printable.contains(where: { $0.contains(byte) }) {
                return Unicode.Scalar(UInt8(byte))
            }
            others += 1
            return Unicode.Scalar(UInt16(0x100 + others - 1)) ?? " "
        }
    }()

    static let bytes = Dictionary(uniqueKeysWithValues: zip(letters, UInt8.min...UInt8.max))

    static func text(of bytes: Bytes) -> String {
        var text = String.UnicodeScalarView()
        text.append(contentsOf: bytes.lazy.map { letters[Int($0)] })
        return String(text)
    }

    /// The bytes that letters stand for; nil where one is no letter of the alphabet.
    static func bytes(of text: String) -> Bytes? {
        var out = Bytes()
        for scalar in text.unicodeScalars {
            guard let byte = bytes[scalar] else { return nil }
            out.append(byte)
        }
        return out
    }
}
