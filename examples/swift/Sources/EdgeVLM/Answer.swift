// What an answer is asked for with, and what comes of it: text as it is made, the time of each
// stage as it ends, and counts at the end.

import Foundation

/// temperature 0 takes the likeliest token each time. topK 0 and topP 1 leave all tokens in.
public struct AnswerOptions: Equatable, Sendable {
    public var maxTokens: Int
    public var temperature: Float
    public var topK: Int
    public var topP: Float
    /// Repeats a draw; nil draws anew each time.
    public var seed: UInt64?
    /// Texts that end an answer, and are not in it.
    public var stop: [String]

    public init(
        maxTokens: Int = 256, temperature: Float = 0, topK: Int = 0, topP: Float = 1,
        seed: UInt64? = nil, stop: [String] = []
    ) {
        self.maxTokens = maxTokens
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
        self.seed = seed
        self.stop = stop
    }

    func check() throws {
        guard maxTokens > 0 else {
            throw EdgeVLMError("maxTokens is \(maxTokens)", "give a number above zero")
        }
        guard temperature >= 0, temperature.isFinite, topK >= 0, 0...1 ~= topP else {
            throw EdgeVLMError(
                "temperature \(temperature), topK \(topK) or topP \(topP) is out of range",
                "give a temperature and topK from zero on, and topP between 0 and 1")
        }
        guard !stop.contains("") else {
            throw EdgeVLMError("a stop text is empty", "leave it out")
        }
    }
}

/// What an answer takes its time for, in order.
public enum Stage: String, Sendable, CaseIterable, Codable {
    /// Pictures brought to the model's size.
    case preprocess
    /// Pictures through the vision tower and the connector.
    case vision
    /// Words -> token ids -> embeddings.
    case tokenise
    /// The prompt through the decoder, up to the first token.
    case prefill
    /// Every token behind the first.
    case decode
}

/// A stage that has ended. count: pictures, tokens of the prompt, or tokens of the answer.
public struct StageTime: Equatable, Sendable, Codable {
    public let stage: Stage
    public let seconds: Double
    public let count: Int

    public init(stage: Stage, seconds: Double, count: Int) {
        self.stage = stage
        self.seconds = seconds
        self.count = count
    }
}

public enum FinishReason: String, Sendable, Codable {
    /// The model ended its answer.
    case end
    /// maxTokens were made.
    case length
    /// The context has no room for more.
    case context
    case stopText
    case cancelled
}

public struct AnswerReport: Equatable, Sendable, Codable {
    /// Positions of the conversation that were computed for earlier turns and taken over.
    public let reusedTokens: Int
    /// Positions computed for this turn, visual tokens among them.
    public let promptTokens: Int
    public let visualTokens: Int
    /// The answer's tokens, without the one that ends it.
    public let tokens: [Int]
    public let stages: [StageTime]
    public let finish: FinishReason
    /// Turns that left the conversation to make room for this one.
    public let droppedTurns: Int

    public init(
        reusedTokens: Int, promptTokens: Int, visualTokens: Int, tokens: [Int],
        stages: [StageTime], finish: FinishReason, droppedTurns: Int = 0
    ) {
        self.reusedTokens = reusedTokens
        self.promptTokens = promptTokens
        self.visualTokens = visualTokens
        self.tokens = tokens
        self.stages = stages
        self.finish = finish
        self.droppedTurns = droppedTurns
    }

    /// From the question to the first token.
    public var timeToFirstToken: Double {
        stages.reduce(0) { $1.stage == .decode ? $0 : $0 + $1.seconds }
    }

    /// Of the tokens behind the first; nil where there are none.
    public var tokensPerSecond: Double? {
        guard let decode = stages.first(where: { $0.stage == .decode }), decode.count > 0,
            decode.seconds > 0
        else { return nil }
        return Double(decode.count) / decode.seconds
    }
}

public enum AnswerEvent: Equatable, Sendable {
    case stage(StageTime)
    case text(String)
    /// The context had no room left: so many turns, the oldest, are no longer seen by the model.
    case dropped(turns: Int)
    case done(AnswerReport)
}

/// Bytes that a session holds. parts: weights by their package or file, mapped or loaded.
public struct MemoryReport: Equatable, Sendable {
    public let parts: [String: Int]
    public let keysAndValues: Int
    public let pictures: Int

    public var total: Int { parts.values.reduce(keysAndValues + pictures, +) }
}
