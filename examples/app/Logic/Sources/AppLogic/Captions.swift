// A camera's frames -> captions, one after the other. Only the newest frame waits; those that come
// while one is looked at are dropped, so that a caption is never of long ago.

import EdgeVLM
import Foundation

public actor Captions<Frame: Sendable> {
    public struct Caption: Equatable, Sendable {
        public let text: String
        /// Captions a second, of the last few.
        public let rate: Double
        public let dropped: Int
    }

    private let describe: @Sendable (Frame) async throws -> String
    private let tell: @Sendable (Caption) async -> Void
    private let now: @Sendable () -> Double
    private var waiting: Frame?
    private var working: Task<Void, any Error>?
    private var dropped = 0
    private var ends: [Double] = []
    /// Seconds from one caption's beginning to the next one's at least; nil pauses.
    private var interval: Double? = 0
    private var began = -Double.infinity
    public private(set) var mistake: String?

    /// describe: a frame -> its caption. now: seconds, of any clock.
    public init(
        now: @escaping @Sendable () -> Double,
        describe: @escaping @Sendable (Frame) async throws -> String,
        tell: @escaping @Sendable (Caption) async -> Void
    ) {
        self.now = now
        self.describe = describe
        self.tell = tell
    }

    /// One more frame; it is looked at at once, after the one that is, or never.
    public func take(_ frame: Frame) {
        guard let interval, now() - began >= interval else {
            dropped += 1
            return
        }
        if working != nil {
            if waiting != nil { dropped += 1 }
            waiting = frame
            return
        }
        start(frame)
    }

    public func slow(to interval: Double?) {
        self.interval = interval
        if interval == nil { waiting = nil }
    }

    /// No more captions; the one that is being made is broken off.
    public func stop() async {
        waiting = nil
        working?.cancel()
        _ = await working?.result
    }

    /// Wait until no frame is being looked at.
    public func idle() async {
        while let working { _ = await working.result }
    }

    private func start(_ frame: Frame) {
        began = now()
        working = Task { [describe] in
            defer { self.next() }
            do {
                let text = try await describe(frame)
                try Task.checkCancellation()
                await self.done(text)
            } catch is CancellationError {
                return
            } catch {
                self.fail(error.localizedDescription)
            }
        }
    }

    private func done(_ text: String) async {
        ends.append(now())
        ends.removeFirst(max(0, ends.count - 5))
        let span = (ends.last ?? 0) - (ends.first ?? 0)
        let rate = span > 0 ? Double(ends.count - 1) / span : 0
        mistake = nil
        await tell(Caption(text: text, rate: rate, dropped: dropped))
    }

    private func fail(_ text: String) { mistake = text }

    private func next() {
        working = nil
        guard let frame = waiting else { return }
        waiting = nil
        start(frame)
    }
}

/// A caption from a model, of a frame alone.
public func caption(
    _ picture: Picture, by model: any Answering, question: String, maxTokens: Int = 30
) async throws -> String {
    await model.reset()
    await model.forgetPictures()
    var text = ""
    let options = AnswerOptions(maxTokens: maxTokens)
    for try await event in model.ask(question, pictures: [picture], options: options) {
        if case .text(let piece) = event { text += piece }
    }
    return text
}
