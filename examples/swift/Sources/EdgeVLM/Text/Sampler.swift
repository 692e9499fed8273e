// What the decoder says -> the next token: the likeliest, or one drawn, in the order of the Python
// side (top-p and top-k on the distribution as it is, then a draw at the temperature).

import Foundation

struct Sampler {
    private let options: AnswerOptions
    private var random: SplitMix64

    init(_ options: AnswerOptions) {
        self.options = options
        random = SplitMix64(state: options.seed ?? UInt64.random(in: 0...UInt64.max))
    }

    /// Raises EdgeVLMError where no logit is a number.
    mutating func pick(_ next: NextToken) throws -> Int {
        guard options.temperature == 0, let token = next.likeliest else {
            return try pick(next.logits())
        }
        guard let logit = try next.logit(token), logit.isFinite else { throw Self.noNumbers }
        return token
    }

    mutating func pick(_ logits: [Float16]) throws -> Int {
        var best = 0
        for token in logits.indices where logits[token] > logits[best] { best = token }
        guard logits.indices.contains(best), logits[best].isFinite else { throw Self.noNumbers }
        guard options.temperature > 0 else { return best }
        return draw(candidates(logits, Float(logits[best])), best)
    }

    private static var noNumbers: EdgeVLMError {
        EdgeVLMError(
            "the decoder gave no logits that are numbers",
            "export it with --compute cpu-gpu, or with --precision fp32")
    }

    /// Tokens that may be drawn, with their logits less the largest.
    private func candidates(_ logits: [Float16], _ top: Float) -> [(token: Int, logit: Float)] {
        var all = logits.enumerated().map { (token: $0.offset, logit: Float($0.element) - top) }
        let narrowed = (0..<1 ~= options.topP && options.topP > 0) || options.topK > 0
        guard narrowed else { return all }
        all.sort { ($0.logit, $1.token) > ($1.logit, $0.token) }
        if options.topP > 0, options.topP < 1 {
            let whole = all.reduce(into: Float(0)) { $0 += exp($1.logit) }
            var sum: Float = 0
            let count = all.prefix { entry in
                defer { sum += exp(entry.logit) / whole }
                return sum < options.topP
            }.count
            all.removeLast(all.count - max(count, 1))
        }
        if options.topK > 0 {
            all.removeLast(max(0, all.count - options.topK))
        }
        return all
    }

    private mutating func draw(_ all: [(token: Int, logit: Float)], _ best: Int) -> Int {
        let weights = all.map { exp($0.logit / options.temperature) }
        var left = random.unit() * weights.reduce(0, +)
        for (entry, weight) in zip(all, weights) {
            left -= weight
            if left < 0 { return entry.token }
        }
        return best
    }
}

/// A small generator whose numbers a seed repeats on every device. Source: Steele, Lea and Flood,
/// "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
struct SplitMix64 {
    private var state: UInt64

    init(state: UInt64) { self.state = state }

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// 0 or more, less than 1.
    mutating func unit() -> Float { Float(next() >> 40) / Float(1 << 24) }
}
