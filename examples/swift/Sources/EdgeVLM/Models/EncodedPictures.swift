// Visual tokens of the pictures that were encoded last, by their pixels, so that none is encoded
// twice; those of the turns that a conversation has stay with it.

import CryptoKit
import Foundation

struct EncodedPictures {
    private var entries: [(key: String, rows: Rows)] = []
    private let most: Int

    /// most: that stay beside those of the conversation.
    init(most: Int) { self.most = most }

    static func key(_ raster: Raster) -> String {
        SHA256.hash(data: Data(raster.rgb)).map { String($0, radix: 16) }.joined(separator: "-")
    }

    subscript(key: String) -> Rows? { entries.first { $0.key == key }?.rows }

    /// Bytes of all visual tokens.
    var bytes: Int { entries.reduce(0) { $0 + 2 * $1.rows.values.count } }

    /// A picture that was used just now. needed: by the turns of the conversation.
    mutating func use(_ key: String, _ rows: Rows, needed: Set<String>) {
        entries.removeAll { $0.key == key }
        entries.append((key, rows))
        forget(except: needed)
    }

    /// Let go of the oldest that are needed no more, beyond those that stay anyway.
    mutating func forget(except needed: Set<String>) {
        var extra = entries.count { !needed.contains($0.key) } - most
        entries.removeAll { entry in
            guard extra > 0, !needed.contains(entry.key) else { return false }
            extra -= 1
            return true
        }
    }

    mutating func removeAll() { entries = [] }
}
