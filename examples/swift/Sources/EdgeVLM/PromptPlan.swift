// A question and the conversation before it -> the input embeddings to run, and how many of the
// oldest turns must leave for it.

/// What to run for a question: all of it behind the keys and values that are there, or the turns
/// from `start` on again, from the beginning.
struct PromptPlan {
    let rows: Rows
    /// nil where the conversation goes on as it is. offsets: where the turns that stay, and the new
    /// one, begin.
    var rebuilt: (start: Int, offsets: [Int])?
}

struct PromptWriter {
    let prompt: Prompt
    let tokenizer: Tokenizer
    let embeddings: Embeddings
    let encoded: EncodedPictures
    let promptCache: PromptCache?

    /// A quarter of the context at most is left free for an answer.
    private static let reserve = 4

    /// How to run a question. Where the context has no room for it and an answer, the oldest turns
    /// leave: so many that half of the room is free, since each time the rest is run again.
    ///
    /// Raises EdgeVLMError for a question that is too long by itself.
    func plan(
        _ words: String, _ pictures: [String], _ transcript: Transcript, _ decoder: LanguageDecoder,
        _ maxTokens: Int
    ) throws -> PromptPlan {
        let entries = transcript.entries
        let context = decoder.geometry.context
        let room = context - min(maxTokens, context / Self.reserve)
        if !transcript.isStale {
            var rows = try embeddings.rows(transcript.pending)
            try append(words, pictures, first: entries.isEmpty, to: &rows)
            if entries.isEmpty {
                try decoder.checkRoom(for: rows.count)
                let first = try beginning(words, pictures)
                rows.values.removeFirst(try decoder.begin(promptCache, with: first) * rows.width)
                return PromptPlan(rows: rows)
            }
            if decoder.offset + rows.count <= room { return PromptPlan(rows: rows) }
        }
        // A turn whose visual tokens are gone cannot be run again.
        let last = entries.lastIndex { $0.pictures.contains { encoded[$0] == nil } } ?? -1
        var enough = transcript.isStale ? room : room / 2
        var start = max(last + 1, transcript.isStale ? 0 : 1)
        while true {
            let (rows, offsets) = try again(entries[start...], words, pictures)
            if rows.count <= enough || start == entries.count {
                try decoder.checkRoom(for: rows.count)
                return PromptPlan(rows: rows, rebuilt: (start, offsets))
            }
            start += 1
            enough = room / 2
        }
    }

    /// The first ids of a conversation, up to its first picture, or but for the last one.
    private func beginning(_ words: String, _ pictures: [String]) throws -> [Int] {
        let parts = try prompt.parts(
            words, pictures: pictures.count, first: true, encode: tokenizer.encode)
        return pictures.isEmpty ? parts[0].dropLast() : parts[0]
    }

    /// Turns with their answers, then a question, from the conversation's beginning on; and where
    /// each of them begins.
    private func again(
        _ entries: ArraySlice<Transcript.Entry>, _ words: String, _ pictures: [String]
    ) throws -> (Rows, [Int]) {
        var rows = try embeddings.rows([])
        var offsets: [Int] = []
        for entry in entries {
            offsets.append(rows.count)
            try append(entry.turn.question, entry.pictures, first: rows.count == 0, to: &rows)
            rows.values += try embeddings.rows(entry.tokens).values
        }
        offsets.append(rows.count)
        try append(words, pictures, first: rows.count == 0, to: &rows)
        return (rows, offsets)
    }

    /// A turn's input embeddings, with the visual tokens of its pictures, up to its answer.
    private func append(
        _ words: String, _ pictures: [String], first: Bool, to rows: inout Rows
    ) throws {
        let parts = try prompt.parts(
            words, pictures: pictures.count, first: first, encode: tokenizer.encode)
        for (place, ids) in parts.enumerated() {
            rows.values += try embeddings.rows(ids).values
            guard place < pictures.count, let tokens = encoded[pictures[place]] else { continue }
            guard tokens.width == rows.width else {
                throw EdgeVLMError(
                    "the visual tokens are \(tokens.width) wide, not \(rows.width)", exportAgain)
            }
            rows.values += tokens.values
        }
    }
}
