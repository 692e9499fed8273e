// The turns of a conversation: what they say, their tokens and pictures, and where each begins in
// the cache. From these the newest turns can be run again when the context is full.

struct Transcript {
    struct Entry {
        var turn: Session.Turn
        /// Of its pictures, by which their visual tokens are looked up.
        let pictures: [String]
        /// The answer's, as far as they are part of the conversation.
        var tokens: [Int] = []
        /// Positions before this turn, and what of the answer before was still to be run then.
        var offset: Int
        var pending: [Int]
    }

    var entries: [Entry] = []
    /// Tokens of the last answer that are not among the keys and values yet.
    var pending: [Int] = []
    /// Whether the keys and values are no longer those of the entries: running the turns again was
    /// broken off.
    var isStale = false

    /// All pictures that the turns have.
    var pictures: Set<String> { Set(entries.flatMap(\.pictures)) }

    /// The turns from `start` on are those that stay; offsets: where each of them, and the one
    /// after them, begins.
    mutating func keep(from start: Int, offsets: [Int]) {
        entries.removeFirst(start)
        for place in entries.indices {
            entries[place].offset = offsets[place]
            entries[place].pending = []
        }
        pending = []
        isStale = false
    }
}
