// Stages of an answer -> the parts of a bar: what the time to the first token was spent on.

import EdgeVLM
import Foundation

public struct StageBar: Equatable, Sendable {
    public struct Part: Equatable, Identifiable, Sendable {
        public let stage: Stage
        public let seconds: Double
        /// Of the whole bar.
        public let share: Double
        public var id: String { stage.rawValue }
    }

    public let parts: [Part]
    /// Seconds to the first token.
    public let total: Double

    public init(_ stages: [StageTime]) {
        let before = stages.filter { $0.stage != .decode }
        let total = before.reduce(0) { $0 + $1.seconds }
        self.total = total
        parts = before.map {
            Part(
                stage: $0.stage, seconds: $0.seconds,
                share: total > 0 ? $0.seconds / total : 0)
        }
    }

    /// For VoiceOver: one sentence.
    public var spoken: String {
        guard !parts.isEmpty else { return "No answer yet" }
        let names: [Stage: String] = [
            .preprocess: "resizing", .vision: "looking", .tokenise: "reading the question",
            .prefill: "thinking",
        ]
        let told = parts.map { "\(names[$0.stage] ?? $0.stage.rawValue) \(Self.time($0.seconds))" }
        return "First word after \(Self.time(total)): " + told.joined(separator: ", ")
    }

    static func time(_ seconds: Double) -> String {
        seconds < 1
            ? "\(Int((seconds * 1000).rounded())) milliseconds"
            : "\((seconds * 10).rounded() / 10) seconds"
    }
}
