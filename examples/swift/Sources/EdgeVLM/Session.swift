// One conversation with a bundle: questions and pictures -> answers, each going on where the last
// one ended. Keys and values of earlier turns stay, and so do the visual tokens of pictures: one
// that comes again is not encoded again.

import Foundation

public actor Session {
    public struct Options: Sendable {
        /// Instructions in the place of the model's own.
        public var system: String?
        /// In the place of the units that the manifest asks for.
        public var units: ComputeUnits?
        /// Run every package once after loading: what fails there, or is wrong by the bundle's
        /// trials, is tried on other units too.
        public var tries: Bool
        /// Pictures whose visual tokens stay.
        public var pictures: Int
        /// One of the manifest's `contexts`; nil takes the first.
        public var context: Int?
        /// One of the manifest's `sizes`; nil takes the first.
        public var size: Manifest.PictureSize?

        public init(
            system: String? = nil, units: ComputeUnits? = nil, tries: Bool = true,
            pictures: Int = 8, context: Int? = nil, size: Manifest.PictureSize? = nil
        ) {
            self.system = system
            self.units = units
            self.tries = tries
            self.pictures = pictures
            self.context = context
            self.size = size
        }
    }

    /// A question with its answer, as far as it came.
    public struct Turn: Equatable, Sendable {
        public let question: String
        public let pictures: Int
        public fileprivate(set) var answer: String
    }

    public let bundle: ModelBundle
    private let options: Options
    private let parts: Runnable
    private let tokenizer: Tokenizer
    private let prompt: Prompt
    private let promptCache: PromptCache?
    private var models: Models?
    private var encoded: EncodedPictures
    private var transcript = Transcript()

    /// The conversation as the model knows it: without turns that were dropped.
    public var turns: [Turn] { transcript.entries.map(\.turn) }

    /// What runs; gone after `unload`.
    private struct Models {
        let vision: VisionEncoder
        let decoder: LanguageDecoder

        init(_ parts: Runnable, _ packages: Packages, _ embeddings: Embeddings) throws {
            vision = try VisionEncoder(parts, packages: packages)
            decoder = try LanguageDecoder(parts, packages: packages, embeddings: embeddings)
        }

        /// Every function of every package once; what trials there are must come out as exported.
        func run(_ parts: Runnable, in folder: URL) throws {
            try vision.tryOut(parts, in: folder)
            try decoder.runEveryFunction()
            if decoder.offset == 0 { try decoder.tryOut(parts, in: folder) }
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
        encoded = EncodedPictures(most: options.pictures)
        parts = try Runnable(
            bundle.manifest, context: options.context, size: options.size)
        prompt = try Prompt(bundle.manifest, system: options.system)
        let embeddings = try Embeddings(
            folder: bundle.folder, described: parts.decoder.embeddings)
        promptCache = try parts.decoder.promptCache.map { [parts] in
            try PromptCache(
                folder: bundle.folder, described: $0, geometry: parts.decoder.geometry)
        }
        tokenizer = try Tokenizer(file: bundle.folder.appending(path: "tokenizer.json"))
        let trial = options.units == nil ? Trial(bundle) : nil
        let candidates = try trial?.candidates(bundle.fallbackUnits) ?? [options.units]
        var failure: (any Error)?
        for units in candidates {
            try Task.checkCancellation()
            // What ends the process is a failure too, and leaves a mark.
            trial?.beginLoading(units)
            defer { trial?.end() }
            do {
                let packages = try await Packages.load(
                    parts, of: bundle, units: units, progress: progress)
                let models = try Models(parts, packages, embeddings)
                if options.tries {
                    trial?.beginRunning(units)
                    try models.run(parts, in: bundle.folder)
                }
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
        try loaded().run(parts, in: bundle.folder)
    }

    /// Let go of the models and of all that was computed; another session must be opened to go on.
    public func unload() {
        models = nil
        encoded.removeAll()
        reset()
    }

    /// Begin a new conversation; pictures that come again are still known.
    public func reset() {
        transcript = Transcript()
        models?.decoder.rewind(to: 0)
    }

    /// Forget the last question and its answer; whether there was one.
    @discardableResult
    public func undo() -> Bool {
        guard let last = transcript.entries.popLast() else { return false }
        if !transcript.isStale {
            transcript.pending = last.pending
            models?.decoder.rewind(to: last.offset)
        }
        return true
    }

    /// Let go of visual tokens, as when the system asks for memory. The conversation goes on, but
    /// where turns must leave it, those up to the last picture do.
    public func forgetPictures() {
        encoded.removeAll()
    }

    public var memory: MemoryReport {
        let packages = [parts.vision.package, parts.connector?.package, parts.decoder.package]
        let names = packages + [parts.decoder.embeddings.file]
        let sizes = names.compactMap { $0 }.map { ($0, models == nil ? 0 : bundle.bytes(of: $0)) }
        return MemoryReport(
            parts: Dictionary(sizes, uniquingKeysWith: +),
            keysAndValues: models?.decoder.cacheBytes ?? 0, pictures: encoded.bytes)
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
        let decoder = models.decoder
        var clock = StageClock(say)
        let keys = try encode(pictures, models.vision, &clock)
        let visual = keys.reduce(0) { $0 + (encoded[$1]?.count ?? 0) }
        let writer = PromptWriter(
            prompt: prompt, tokenizer: tokenizer, embeddings: decoder.embeddings, encoded: encoded,
            promptCache: promptCache)
        let plan = try writer.plan(words, keys, transcript, decoder, options.maxTokens)
        clock.end(.tokenise, plan.rows.count)
        let dropped = plan.rebuilt?.start ?? 0
        if dropped > 0 { say(.dropped(turns: dropped)) }
        let reused = plan.rebuilt == nil ? decoder.offset : 0
        let said = try prefill(plan, decoder)
        clock.end(.prefill, plan.rows.count)
        transcript.entries.append(
            Transcript.Entry(
                turn: Turn(question: words, pictures: pictures.count, answer: ""), pictures: keys,
                offset: plan.rebuilt?.offsets.last ?? reused, pending: transcript.pending))
        transcript.pending = []
        encoded.forget(except: transcript.pictures)
        let tokens: [Int]
        let finish: FinishReason
        do {
            (tokens, finish) = try generate(said, options, decoder, say)
        } catch {
            undo()
            throw error
        }
        if tokens.isEmpty, finish == .cancelled { undo() }
        if tokens.count > 1 { clock.end(.decode, tokens.count - 1) }
        say(
            .done(
                AnswerReport(
                    reusedTokens: reused, promptTokens: plan.rows.count, visualTokens: visual,
                    tokens: tokens, stages: clock.stages, finish: finish, droppedTurns: dropped)))
    }

    /// Pictures -> their visual tokens, which are looked up by these keys.
    private func encode(
        _ pictures: [Picture], _ vision: VisionEncoder, _ clock: inout StageClock
    ) throws -> [String] {
        let fitted = try pictures.map { picture in
            try Task.checkCancellation()
            return try picture.raster.fitted(to: vision.preprocessing)
        }
        if !pictures.isEmpty { clock.end(.preprocess, pictures.count) }
        let keys = fitted.map(EncodedPictures.key)
        let needed = transcript.pictures.union(keys)
        for (raster, key) in zip(fitted, keys) {
            try Task.checkCancellation()
            let rows = try encoded[key] ?? vision.encode(raster)
            encoded.use(key, rows, needed: needed)
        }
        if !pictures.isEmpty { clock.end(.vision, pictures.count) }
        return keys
    }

    /// Run a plan. Where that fails the conversation is as it was, and what was run is forgotten.
    private func prefill(_ plan: PromptPlan, _ decoder: LanguageDecoder) throws -> NextToken {
        let offset = decoder.offset
        guard let (start, offsets) = plan.rebuilt else {
            do {
                return try decoder.prefill(plan.rows)
            } catch {
                decoder.rewind(to: offset)
                throw error
            }
        }
        transcript.isStale = true
        decoder.rewind(to: 0)
        let said = try decoder.prefill(plan.rows)
        transcript.keep(from: start, offsets: offsets)
        return said
    }

    /// Tokens one after the other, and why there are no more.
    private func generate(
        _ first: NextToken, _ options: AnswerOptions, _ decoder: LanguageDecoder,
        _ say: (AnswerEvent) -> Void
    ) throws -> ([Int], FinishReason) {
        let own = transcript.entries.count - 1
        var sampler = Sampler(options)
        var detokenizer = tokenizer.detokenizer()
        var stops = StopStrings(options.stop)
        var next = first
        var tokens: [Int] = []
        let beginning = decoder.offset
        func tell(_ text: String) {
            guard !text.isEmpty else { return }
            transcript.entries[own].turn.answer += text
            say(.text(text))
        }
        func ended(_ finish: FinishReason) -> ([Int], FinishReason) {
            tell(stops.feed(detokenizer.finish()))
            let stopped = stops.matched != nil
            if !stopped { tell(stops.flush()) }
            // What a stop text cut off is not part of the conversation.
            let stay = stopped ? whole(tokens, transcript.entries[own].turn.answer) : tokens
            decoder.rewind(to: beginning + stay.count)
            transcript.entries[own].tokens = stay
            transcript.pending = Array(stay.dropFirst(decoder.offset - beginning))
            return (tokens, stopped ? .stopText : finish)
        }
        while true {
            if Task.isCancelled { return ended(.cancelled) }
            let token = try sampler.pick(next)
            if prompt.ends.contains(token) { return ended(.end) }
            tokens.append(token)
            tell(stops.feed(detokenizer.add(token)))
            if stops.matched != nil { return ended(.stopText) }
            if tokens.count >= options.maxTokens { return ended(.length) }
            guard decoder.hasRoom else { return ended(.context) }
            next = try decoder.step(token)
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
