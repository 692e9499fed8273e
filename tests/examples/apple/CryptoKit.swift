// CryptoKit, as far as EdgeVLM uses it; the declarations' sources are the pages
// developer.apple.com/documentation/cryptokit/sha256 and cryptokit/hashfunction.

import Foundation

public typealias SHA256Digest = [UInt8]

/// FIPS 180-4.
public struct SHA256 {
    public typealias Digest = SHA256Digest
    private var state: [UInt32] = [
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab,
        0x5be0cd19,
    ]
    private var rest: [UInt8] = []
    private var length: UInt64 = 0

    private static let rounds: [UInt32] = primes(64).map { fraction(cbrt(Double($0)), $0, 3) }

    public init() {}

    public mutating func update<D: DataProtocol>(data: D) {
        length += UInt64(data.count)
        rest += data
        let whole = rest.count / 64 * 64
        rest.withUnsafeBufferPointer { bytes in
            for start in stride(from: 0, to: whole, by: 64) { block(bytes, start) }
        }
        rest.removeFirst(whole)
    }

    public func finalize() -> Digest {
        var last = self
        let bits = length * 8
        var tail: [UInt8] = [0x80]
        while (rest.count + tail.count) % 64 != 56 { tail.append(0) }
        tail += (0..<8).reversed().map { UInt8(truncatingIfNeeded: bits >> (8 * $0)) }
        last.update(data: tail)
        return last.state.flatMap { word in
            (0..<4).reversed().map { UInt8(truncatingIfNeeded: word >> (8 * $0)) }
        }
    }

    public static func hash<D: DataProtocol>(data: D) -> Digest {
        var hash = SHA256()
        hash.update(data: data)
        return hash.finalize()
    }

    private mutating func block(_ bytes: UnsafeBufferPointer<UInt8>, _ start: Int) {
        withUnsafeTemporaryAllocation(of: UInt32.self, capacity: 64) { w in
            for i in 0..<16 {
                w[i] = (0..<4).reduce(0) { $0 << 8 | UInt32(bytes[start + 4 * i + $1]) }
            }
            for i in 16..<64 {
                let a = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ (w[i - 15] >> 3)
                let b = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ (w[i - 2] >> 10)
                w[i] = w[i - 16] &+ a &+ w[i - 7] &+ b
            }
            var (a, b, c, d) = (state[0], state[1], state[2], state[3])
            var (e, f, g, h) = (state[4], state[5], state[6], state[7])
            for i in 0..<64 {
                let one = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)
                let first = h &+ one &+ ((e & f) ^ (~e & g)) &+ Self.rounds[i] &+ w[i]
                let two = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)
                let second = two &+ ((a & b) ^ (a & c) ^ (b & c))
                (h, g, f, e, d, c, b, a) = (g, f, e, d &+ first, c, b, a, first &+ second)
            }
            for (i, word) in [a, b, c, d, e, f, g, h].enumerated() { state[i] &+= word }
        }
    }

    private func turn(_ x: UInt32, _ n: UInt32) -> UInt32 { x >> n | x << (32 - n) }

    private static func primes(_ count: Int) -> [Int] {
        var found: [Int] = []
        var next = 2
        while found.count < count {
            if !found.contains(where: { next % $0 == 0 }) { found.append(next) }
            next += 1
        }
        return found
    }

    private static func fraction(_ root: Double, _: Int, _: Int) -> UInt32 {
        UInt32((root - root.rounded(.down)) * 4_294_967_296)
    }
}
