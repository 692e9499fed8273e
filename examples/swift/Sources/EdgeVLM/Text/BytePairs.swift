// The BPE model of tokenizer.json: a piece of text -> ids, by merging the pair that was learned
// first again and again, the leftmost where several are alike.

import Foundation

struct BytePairs: Sendable {
    private let ids: [Bytes: Int]
    private let contents: [Bytes?]
    /// Left id << 32 | right id -> its place in the order of merges << 32 | the id of both in one.
    private let merges: [UInt64: UInt64]
    private let bytes: [Int]?
    private let unknown: Int?
    private let fusesUnknown: Bool
    private let takesWhole: Bool

    init(_ json: JSONText) throws {
        let kind = json["type"].text ?? ""
        guard kind == "BPE" || (kind.isEmpty && !json["merges"].isNull) else {
            throw notKnown("model", kind)
        }
        guard json["dropout"].isNull, (json["continuing_subword_prefix"].text ?? "").isEmpty,
            (json["end_of_word_suffix"].text ?? "").isEmpty
        else { throw notKnown("model", "BPE with dropout, prefixes or suffixes") }
        var ids: [Bytes: Int] = [:]
        var contents: [Bytes?] = []
        for (name, value) in json["vocab"].entries {
            guard let id = value.int, 0..<1 << 24 ~= id else {
                throw EdgeVLMError("tokenizer.json: a token's id is no number", exportAgain)
            }
            ids[name] = id
            if id >= contents.count {
                contents += Array(repeating: nil, count: id + 1 - contents.count)
            }
            contents[id] = name
        }
        var merges: [UInt64: UInt64] = [:]
        for (rank, merge) in json["merges"].items.enumerated() {
            let pair = merge.items.compactMap(\.bytes)
            let both = pair.isEmpty ? Self.halves(merge.bytes ?? []) : pair
            guard both.count == 2, let left = ids[both[0]], let right = ids[both[1]],
                let joined = ids[both[0] + both[1]]
            else {
                throw EdgeVLMError(
                    "tokenizer.json: merge \(rank) is of unknown tokens", exportAgain)
            }
            let key = UInt64(left) << 32 | UInt64(right)
            if merges[key] == nil { merges[key] = UInt64(rank) << 32 | UInt64(joined) }
        }
        let fallback = (0..<256).compactMap { ids[Bytes(String(format: "<0x%02X>", $0).utf8)] }
        bytes = json["byte_fallback"].bool && fallback.count == 256 ? fallback : nil
        unknown = json["unk_token"].bytes.flatMap { ids[$0] }
        fusesUnknown = json["fuse_unk"].bool
        takesWhole = json["ignore_merges"].bool
        self.ids = ids
        self.contents = contents
        self.merges = merges
    }

    private static func halves(_ text: Bytes) -> [Bytes] {
        text.split(separator: 0x20, omittingEmptySubsequences: false).map(Bytes.init)
    }

    func content(_ id: Int) -> Bytes? { contents.indices.contains(id) ? contents[id] : nil }

    func ids(_ piece: Bytes) -> [Int] {
        if takesWhole, let whole = ids[piece] { return [whole] }
        return merged(letters(piece))
    }

    /// The ids of a piece's characters; of their bytes, or the unknown one, where there are none.
    private func letters(_ piece: Bytes) -> [Int] {
        var letters: [Int] = []
        var fused = false
        var place = 0
        while place < piece.count {
            let end = min(place + Self.length(piece[place]), piece.count)
            let letter = Bytes(piece[place..<end])
            place = end
            if let id = ids[letter] {
                letters.append(id)
            } else if let bytes {
                letters += letter.map { bytes[Int($0)] }
            } else if let unknown {
                if !(fusesUnknown && fused) { letters.append(unknown) }
                fused = true
                continue
            }
            fused = false
        }
        return letters
    }

    /// Bytes of a character by its first one.
    private static func length(_ first: UInt8) -> Int {
        first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4
    }

    private func merged(_ letters: [Int]) -> [Int] {
        var ids = letters
        var found = zip(ids, ids.dropFirst()).map(pair)
        while let best = found.min(), best != .max, let place = found.firstIndex(of: best) {
            ids[place] = Int(best & 0xFFFF_FFFF)
            ids.remove(at: place + 1)
            found.remove(at: place)
            if place > 0 { found[place - 1] = pair(ids[place - 1], ids[place]) }
            if place < found.count { found[place] = pair(ids[place], ids[place + 1]) }
        }
        return ids
    }

    /// The place in the order of merges and the id of two together; UInt64.max where there is none.
    private func pair(_ left: Int, _ right: Int) -> UInt64 {
        merges[UInt64(left) << 32 | UInt64(right)] ?? .max
    }
}
