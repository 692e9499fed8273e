// One conversation with a bundle: questions and pictures -> answers, each going on where the last
// one ended. Keys and values of earlier turns stay, and so do the visual tokens of pictures: one
// that comes again is not encoded again.

import CryptoKit
import Foundation

public actor Session {
    public struct Options: Sendable {
        /// Instructions in the place of the model's own.
        public var system: String?
        /// In the place of the units that the manifest asks for.
        public var units: ComputeUnits?
        /// Run every package once after loading: what fails there is tried on other units too.
        public var tries: Bool
        /// Pictures whose visual tokens stay.
        public var pictures: Int

        public init(
            system: String? = nil, units: ComputeUnits? = nil, tries: Bool = true,
            pictures: Int = 8
        ) {
            self.system = system
            self.units = units
            self.tries = tries
            self.pictures = pictures
        }
    }

    /// A question with its answer, as far as it came.
    public struct Turn: Equatable, Sendable {
        public let question: String
        public let pictures: Int
        public fileprivate(set) var answer: String
    }

    public private(set) var turns: [Turn] = []
    public let bundle: ModelBundle
    private let options: Options
    private let tokenizer: Tokenizer
    private let prompt: Prompt
    private var models: Models?
    private var encoded: [(key: String, rows: Rows)] = []
    /// Where each turn began, and what of the answer before it was still to be run.
    private var beginnings: [(offset: Int, pending: [Int])] = []
    /// Tokens of the last answer that are not among the keys and values yet.
    private var pending: [Int] = []

    /// What runs; gone after `unload`.
    private struct Models {
        let vision: VisionEncoder
        let decoder: LanguageDecoder

        init(_ bundle: ModelBundle, _ packages: Packages) throws {
            vision = try VisionEncoder(bundle: bundle, packages: packages)
            decoder = try LanguageDecoder(bundle: bundle, packages: packages)
        }

        /// Every package once, on a blank picture and one token.
        func run() throws {
            let wanted = vision.preprocessing
            let blank = Raster(width: wanted.width, height: wanted.height, fill: [0, 0, 0])
            _ = try vision.encode(blank)
            let offset = decoder.offset
            defer { decoder.rewind(to: offset) }
            guard offset + 1 < decoder.geometry.context else { return }
            _ = try decoder.prefill(try decoder.embeddings.rows([0]))
            _ = try decoder.step(0)
        }
    }

    /// Load a bundle. The first time on a device Core ML compiles it, which may take minutes;
    /// progress is told before each part.
    public init(
        bundle: ModelBundle, options: Options = Options(),
        progress: (@Sendable (LoadStep) -> Void)? = nil
    ) async throws {
        self.bundle = bundle
        self.options = options
        prompt = try Prompt(bundle.manifest, system: options.system)
        tokenizer = try Tokenizer(file: bundle.folder.appending(path: "tokenizer.json"))
        let trial = options.units == nil ? Trial(bundle) : nil
        let candidates = try trial?.candidates(bundle.fallbackUnits) ?? [options.units]
        var failure: (any Error)?
        for units in candidates {
            try Task.checkCancellation()
            // What ends the process is a failure too, and leaves this mark.
            trial?.begin(units)
            defer { trial?.end() }
            do {
                let packages = try await Packages.load(bundle, units: units, progress: progress)
                let models = try Models(bundle, packages)
                if options.tries { try models.run() }
                self.models = models
                if let units { trial?.remember(units) }
                return
            } catch {
                failure = failure ?? error
            }
        }
        throw failure ?? CancellationError()
    }

    /// Run every package once, so that the first question does not wait for it.
    public func prewarm() throws {
        try loaded().run()
    }

    /// Let go of the models and of all that was computed; another session must be opened to go on.
    public func unload() {
        models = nil
        encoded = []
        reset()
    }

    /// Begin a new conversation; pictures that come again are still known.
    public func reset() {
        turns = []
        beginnings = []
        pending = []
        models?.decoder.rewind(to: 0)
    }

    /// Forget the last question and its answer; whether there was one.
    @discardableResult
    public func undo() -> Bool {
        guard let last = beginnings.popLast() else { return false }
        turns.removeLast()
        pending = last.pending
        models?.decoder.rewind(to: last.offset)
        return true
    }

    /// Let go of visual tokens, as when the system asks for memory.
    public func forgetPictures() {
        encoded = []
    }

    public var memory: MemoryReport {
        let parts = bundle.manifest.parts
        let packages = [parts.vision?.package, parts.connector?.package, parts.decoder?.package]
        let names = packages + [parts.decoder?.embeddings.file]
        let sizes = names.compactMap { $0 }.map { ($0, models == nil ? 0 : bundle.bytes(of: $0)) }
        return MemoryReport(
            parts: Dictionary(sizes, uniquingKeysWith: +),
            keysAndValues: models?.decoder.cacheBytes ?? 0,
            pictures: encoded.reduce(0) { $0 + 2 * $1.rows.values.count })
    }

    private func loaded() throws -> Models {
        guard let models else {
            throw EdgeVLMError("the model was unloaded", "open another session")
        }
        return models
    }

    /// The answer to one more question, as it is made. Cancelling the task that reads it, or no
    /// longer reading, stops the model; what was said until then stays in the conversation. A
    /// second question waits for the first one's answer.
    public nonisolated func ask(
        _ question: String, pictures: [Picture] = [], options: AnswerOptions = AnswerOptions()
    ) -> AsyncThrowingStream<AnswerEvent, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.answer(question, pictures, options) { continuation.yield($0) }
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

    private func answer(
        _ question: String, _ pictures: [Picture], _ options: AnswerOptions,
        _ say: @escaping @Sendable (AnswerEvent) -> Void
    ) throws {
        try options.check()
        let models = try loaded()
        let words = try prompt.checked(question)
        let before = (offset: models.decoder.offset, pending: pending)
        var clock = StageClock(say)
        let logits: [Float16]
        let visual: Int
        do {
            let tokens = try visualTokens(pictures, models, &clock)
            visual = tokens.reduce(0) { $0 + $1.count }
            let rows = try promptRows(words, tokens, models.decoder)
            clock.end(.tokenise, rows.count)
            logits = try models.decoder.prefill(rows)
            clock.end(.prefill, rows.count)
        } catch {
            models.decoder.rewind(to: before.offset)
            pending = before.pending
            throw error
        }
        beginnings.append(before)
        turns.append(Turn(question: words, pictures: pictures.count, answer: ""))
        let prompted = models.decoder.offset
        let tokens: [Int]
        let finish: FinishReason
        do {
            (tokens, finish) = try generate(logits, options, models.decoder, say)
        } catch {
            undo()
            throw error
        }
        if tokens.isEmpty, finish == .cancelled { undo() }
        if tokens.count > 1 { clock.end(.decode, tokens.count - 1) }
        say(
            .done(
                AnswerReport(
                    reusedTokens: before.offset, promptTokens: prompted - before.offset,
                    visualTokens: visual, tokens: tokens, stages: clock.stages, finish: finish)))
    }

    private func visualTokens(
        _ pictures: [Picture], _ models: Models, _ clock: inout StageClock
    ) throws -> [Rows] {
        let fitted = try pictures.map { picture in
            try Task.checkCancellation()
            return try picture.raster.fitted(to: models.vision.preprocessing)
        }
        if !pictures.isEmpty { clock.end(.preprocess, pictures.count) }
        let tokens = try fitted.map { raster in
            try Task.checkCancellation()
            return try visualTokens(raster, models.vision)
        }
        if !pictures.isEmpty { clock.end(.vision, pictures.count) }
        return tokens
    }

    private func visualTokens(_ raster: Raster, _ vision: VisionEncoder) throws -> Rows {
        let key = SHA256.hash(data: Data(raster.rgb)).map { String($0, radix: 16) }.joined(
            separator: "-")
        if let place = encoded.firstIndex(where: { $0.key == key }) {
            let known = encoded.remove(at: place)
            encoded.append(known)
            return known.rows
        }
        let rows = try vision.encode(raster)
        encoded.append((key, rows))
        encoded.removeFirst(max(0, encoded.count - options.pictures))
        return rows
    }

    /// What is left to run of the last answer, then this turn.
    private func promptRows(
        _ words: String, _ tokens: [Rows], _ decoder: LanguageDecoder
    ) throws -> Rows {
        let parts = try prompt.parts(
            words, pictures: tokens.count, first: turns.isEmpty, encode: tokenizer.encode)
        var rows = try decoder.embeddings.rows(pending)
        for (place, ids) in parts.enumerated() {
            rows.values += try decoder.embeddings.rows(ids).values
            if place < tokens.count {
                guard tokens[place].width == rows.width else {
                    throw EdgeVLMError(
                        "the visual tokens are \(tokens[place].width) wide, not \(rows.width)",
                        exportAgain)
                }
                rows.values += tokens[place].values
            }
        }
        pending = []
        return rows
    }

    /// Tokens one after the other, and why there are no more.
    private func generate(
        _ first: [Float16], _ options: AnswerOptions, _ decoder: LanguageDecoder,
        _ say: (AnswerEvent) -> Void
    ) throws -> ([Int], FinishReason) {
        var sampler = Sampler(options)
        var detokenizer = tokenizer.detokenizer()
        var stops = StopStrings(options.stop)
        var logits = first
        var tokens: [Int] = []
        let beginning = decoder.offset
        func tell(_ text: String) {
            guard !text.isEmpty else { return }
            turns[turns.count - 1].answer += text
            say(.text(text))
        }
        func ended(_ finish: FinishReason) -> ([Int], FinishReason) {
            tell(stops.feed(detokenizer.finish()))
            let stopped = stops.matched != nil
            if !stopped { tell(stops.flush()) }
            // What a stop text cut off is not part of the conversation.
            let kept = stopped ? whole(tokens, turns[turns.count - 1].answer) : tokens
            decoder.rewind(to: beginning + kept.count)
            pending = Array(kept.dropFirst(decoder.offset - beginning))
            return (tokens, stopped ? .stopText : finish)
        }
        while true {
            if Task.isCancelled { return ended(.cancelled) }
            let token = try sampler.pick(logits)
            if prompt.ends.contains(token) { return ended(.end) }
            tokens.append(token)
            tell(stops.feed(detokenizer.add(token)))
            if stops.matched != nil { return ended(.stopText) }
            if tokens.count >= options.maxTokens { return ended(.length) }
            guard decoder.hasRoom else { return ended(.context) }
            logits = try decoder.step(token)
        }
    }
}

extension Session {
    /// The first tokens, whose text is no longer than what was said.
    private func whole(_ tokens: [Int], _ said: String) -> [Int] {
        var detokenizer = tokenizer.detokenizer()
        var length = 0
        let count = tokens.prefix { token in
            length += detokenizer.add(token).utf8.count
            return length <= said.utf8.count
        }.count
        return Array(tokens.prefix(count))
    }
}

/// Tells of each stage as it ends.
private struct StageClock {
    private(set) var stages: [StageTime] = []
    private var last = ContinuousClock.now
    private let say: @Sendable (AnswerEvent) -> Void

    init(_ say: @escaping @Sendable (AnswerEvent) -> Void) { self.say = say }

    mutating func end(_ stage: Stage, _ count: Int) {
        let now = ContinuousClock.now
        let time = StageTime(stage: stage, seconds: (now - last) / .seconds(1), count: count)
        last = now
        stages.append(time)
        say(.stage(time))
    }
}

extension ModelBundle {
    /// What the manifest says to try in turn where loading or the trial fails; nothing but where
    /// some part is for the Neural Engine, whose failures other units do not share.
    var fallbackUnits: [ComputeUnits] {
        get throws {
            let parts = manifest.parts
            let units = [parts.vision, parts.connector].map { $0?.computeUnits }
            let engine = ComputeUnits.cpuAndNeuralEngine.rawValue
            guard units.contains(engine) || parts.decoder?.computeUnits == engine else { return [] }
            let names = parts.decoder?.fallbackUnits ?? parts.vision?.fallbackUnits ?? []
            return try names.map { try ComputeUnits(manifest: $0) }
        }
    }
}
