// A picture and a question -> the answer's text, piece by piece: prompt ids around the visual
// tokens, input embeddings, prefill, then greedy or sampled tokens until one that ends the answer.

import CoreGraphics
import Foundation
import Tokenizers

/// temperature 0 takes the likeliest token each time.
public struct AnswerOptions: Sendable {
    public var maxTokens: Int
    public var temperature: Float

    public init(maxTokens: Int = 256, temperature: Float = 0) {
        self.maxTokens = maxTokens
        self.temperature = temperature
    }
}

/// One bundle, ready to answer; a second answer waits for the first to end.
public actor Generator {
    private let vision: VisionEncoder
    private let decoder: LanguageDecoder
    private let tokenizer: any Tokenizer
    private let prompt: Manifest.Prompt
    private let ends: Set<Int>

    public init(bundle: ModelBundle) async throws {
        guard let prompt = bundle.manifest.prompt else {
            throw EdgeVLMError(
                "the bundle has no prompt: this model writes pictures as only its own code can")
        }
        self.prompt = prompt
        ends = Set(bundle.manifest.tokens.eos)
        do {
            tokenizer = try await AutoTokenizer.from(modelFolder: bundle.folder)
        } catch {
            throw EdgeVLMError(
                "the bundle's tokenizer cannot be read: \(error.localizedDescription)")
        }
        vision = try await VisionEncoder(bundle: bundle)
        decoder = try await LanguageDecoder(bundle: bundle)
    }

    /// The answer as it is made. Cancelling the task that reads it stops the model.
    public nonisolated func answer(
        image: CGImage, question: String, options: AnswerOptions = AnswerOptions()
    ) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.run(image, question, options) { piece in
                        continuation.yield(piece)
                    }
                    continuation.finish()
                } catch is CancellationError {
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func run(
        _ image: CGImage, _ question: String, _ options: AnswerOptions,
        _ say: @Sendable (String) -> Void
    ) throws {
        let text = try questionIds(question)
        try decoder.reset()
        let tokens = try vision.encode(image)
        var rows = try decoder.embeddings.rows(prompt.beforeImage)
        guard tokens.width == rows.width else {
            throw EdgeVLMError("the visual tokens are \(tokens.width) wide, not \(rows.width)")
        }
        rows.values += tokens.values
        rows.values += try decoder.embeddings.rows(prompt.afterImage + text).values
        var logits = try decoder.prefill(rows)
        var ids: [Int] = []
        var said = 0
        while ids.count < options.maxTokens {
            try Task.checkCancellation()
            let token = try Self.pick(logits, options.temperature)
            if ends.contains(token) {
                break
            }
            ids.append(token)
            said = speak(ids, said, final: false, say)
            guard ids.count < options.maxTokens, decoder.hasRoom else {
                break
            }
            logits = try decoder.step(token)
        }
        _ = speak(ids, said, final: true, say)
    }

    /// Ids of the question with what the family writes around it. White space around it goes, as
    /// the manifest's prompt asks for; the chat format's own tokens in it are refused.
    private func questionIds(_ question: String) throws -> [Int] {
        let words = question.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !words.isEmpty else {
            throw EdgeVLMError("the question is empty")
        }
        if let special = prompt.specialTokens.first(where: { words.contains($0) }) {
            throw EdgeVLMError("the question has the chat's own \(special) in it; take it out")
        }
        let whole = prompt.beforeQuestion + words + prompt.afterQuestion
        return tokenizer.encode(text: whole, addSpecialTokens: false)
    }

    /// Say what `ids` have beyond `said` bytes, but for a character whose end is still to come.
    private func speak(
        _ ids: [Int], _ said: Int, final: Bool, _ say: (String) -> Void
    ) -> Int {
        let text = tokenizer.decode(tokens: ids, skipSpecialTokens: true)
        guard final || !text.hasSuffix("\u{FFFD}"), text.utf8.count > said else {
            return said
        }
        say(String(decoding: text.utf8.dropFirst(said), as: UTF8.self))
        return text.utf8.count
    }

    /// The likeliest token, or one drawn from softmax(logits / temperature).
    static func pick(_ logits: [Float16], _ temperature: Float) throws -> Int {
        guard let best = logits.indices.max(by: { logits[$0] < logits[$1] }), logits[best].isFinite
        else {
            throw EdgeVLMError("the decoder gave no logits that are numbers")
        }
        guard temperature > 0 else {
            return best
        }
        let weights = logits.map { exp((Float($0) - Float(logits[best])) / temperature) }
        var left = Float.random(in: 0..<1) * weights.reduce(0, +)
        for (token, weight) in weights.enumerated() {
            left -= weight
            if left < 0 {
                return token
            }
        }
        return best
    }
}
