// Questions, pictures and answers as a screen shows them. What answers is a protocol, so that all
// of it runs without a model.

import EdgeVLM
import Foundation
import Observation

/// What a chat asks; `Session` is one.
public protocol Answering: Sendable {
    func ask(
        _ question: String, pictures: [Picture], options: AnswerOptions
    ) -> AsyncThrowingStream<AnswerEvent, Error>
    func reset() async
    func forgetPictures() async
    func unload() async
}

extension Session: Answering {}

public struct Message: Identifiable, Equatable, Sendable, Codable {
    public enum Author: String, Sendable, Codable { case user, model }

    public let id: Int
    public let author: Author
    public var text: String
    public let pictures: Int
    public var report: AnswerReport?
    /// What went wrong: cause and remedy.
    public var mistake: String?
    /// Turns that the model has forgotten, to make room for this one.
    public var dropped = 0
    /// Of an earlier run of the app, or said to an earlier model: the model does not know it.
    public var isEarlier = false

    /// What is shown beside an answer that cost others their place.
    public var note: String? {
        dropped == 0
            ? nil
            : "The conversation had become too long: the model no longer knows "
                + (dropped == 1 ? "its oldest question" : "its \(dropped) oldest questions")
    }
}

@MainActor
@Observable
public final class Chat {
    public enum State: Equatable, Sendable {
        case noModel
        case loading(done: Int, total: Int)
        case idle
        /// Up to the first token.
        case thinking
        case answering
    }

    public private(set) var state = State.noModel
    public private(set) var messages: [Message] = []
    /// Pictures of the next question.
    public private(set) var attached: [Picture] = []
    public private(set) var stages: [StageTime] = []
    public var settings: AppSettings
    /// Called when an answer has come to its end.
    @ObservationIgnored public var answered: (@MainActor () -> Void)?

    public private(set) var model: (any Answering)?
    /// Of loading a model or letting go of it; one after the other.
    private var changing: Task<Void, Never>?
    private var loads = 0
    private var task: Task<String?, Never>?
    /// Of the last question.
    private var failure: (any Error)?
    private var next = 0
    /// Pieces are shown a few at a time: a view drawn for each costs speed.
    private var unshown = ""
    private var pieces = 0
    private static let shownAtOnce = 4

    public init(settings: AppSettings = AppSettings()) { self.settings = settings }

    /// Load a model in the place of the one there is. A load that is going on is broken off, and
    /// ends before this one begins: two together would take twice the memory.
    public func load<Model: Answering>(
        _ open: @escaping @Sendable (@escaping @Sendable (LoadStep) -> Void) async throws -> Model
    ) async {
        await change {
            self.loads += 1
            self.state = .loading(done: 0, total: 1)
            do {
                let model = try await open { [weak self, number = self.loads] step in
                    Task { @MainActor in self?.told(step, of: number) }
                }
                try Task.checkCancellation()
                self.loaded(model)
            } catch {
                self.state = .noModel
                if !Task.isCancelled { self.failed(error) }
            }
        }
    }

    /// A step may be told late, when its load has ended.
    private func told(_ step: LoadStep, of number: Int) {
        guard isLoading, number == loads, step.done < step.total else { return }
        state = .loading(done: step.done, total: step.total)
    }

    private func change(_ next: @escaping @MainActor () async -> Void) async {
        let last = changing
        last?.cancel()
        let task = Task {
            await last?.value
            if Task.isCancelled { return }  // another has come meanwhile
            await self.letGo()
            if Task.isCancelled { return }
            await next()
        }
        changing = task
        await task.value
    }

    public func loaded(_ model: any Answering) {
        for place in messages.indices { messages[place].isEarlier = true }
        self.model = model
        state = .idle
    }

    public func failed(_ error: any Error) {
        model = nil
        state = .noModel
        append(.model, "", mistake: error.localizedDescription)
    }

    /// Let go of the model, as when the app is asked for memory; what was said stays. A load that
    /// is going on is broken off.
    public func unload() async { await change {} }

    private func letGo() async {
        await stop()
        await model?.unload()
        model = nil
        state = .noModel
    }

    public func attach(_ picture: Picture) { attached.append(picture) }

    public func detach(_ place: Int) {
        if attached.indices.contains(place) { attached.remove(at: place) }
    }

    public var canAsk: Bool { state == .idle && model != nil }

    public var isBusy: Bool { state == .thinking || state == .answering }

    public var isLoading: Bool {
        if case .loading = state { return true }
        return false
    }

    /// Ask about what is attached; whether it is asked, which an empty question is not.
    @discardableResult
    public func ask(_ question: String) -> Bool {
        guard begin(question, attached) else { return false }
        attached = []
        return true
    }

    private func begin(_ question: String, _ pictures: [Picture]) -> Bool {
        let words = question.trimmingCharacters(in: .whitespacesAndNewlines)
        guard canAsk, !words.isEmpty, let model else { return false }
        append(.user, words, pictures: pictures.count)
        append(.model, "")
        stages = []
        failure = nil
        state = .thinking
        let stream = model.ask(words, pictures: pictures, options: settings.options)
        task = Task { [weak self] in
            var text = ""
            var isWhole = false
            do {
                for try await event in stream {
                    if case .text(let piece) = event { text += piece }
                    self?.take(event)
                }
                isWhole = !Task.isCancelled
            } catch {
                self?.fail(error)
            }
            self?.end()
            return isWhole ? text : nil
        }
        return true
    }

    /// Break off the answer; what was said stays.
    public func stop() async {
        task?.cancel()
        await finish()
    }

    /// Wait for the answer's end.
    public func finish() async { _ = await task?.value }

    public func newConversation() async {
        await stop()
        messages = []
        stages = []
        attached = []
        await model?.reset()
    }

    /// The whole answer to a question about one picture, in a new conversation, as a shortcut asks
    /// it.
    ///
    /// Raises EdgeVLMError where there is no model, it is busy, fails, or is stopped.
    public func answer(_ question: String, about picture: Picture) async throws -> String {
        try checkCanAsk()
        await newConversation()
        try checkCanAsk()  // another question may have come in between
        guard begin(question, [picture]), let task else {
            throw EdgeVLMError("the question is empty", "ask something")
        }
        let text = await task.value
        if let text { return text }
        if let failure { throw failure }
        throw EdgeVLMError("the answer was stopped", "ask again")
    }

    private func checkCanAsk() throws {
        if canAsk { return }
        throw isBusy
            ? EdgeVLMError("another question is being answered", "ask again when it is done")
            : EdgeVLMError("no model is loaded", "open the app, and choose one in its settings")
    }

    /// Show what an earlier run of the app left; the model does not know it.
    public func restore(_ earlier: [Message]) {
        guard messages.isEmpty else { return }
        messages = earlier
        for place in messages.indices { messages[place].isEarlier = true }
        next = (earlier.map(\.id).max() ?? -1) + 1
    }

    private func take(_ event: AnswerEvent) {
        switch event {
        case .dropped(let turns): last { $0.dropped = turns }
        case .stage(let time): stages.append(time)
        case .text(let piece):
            state = .answering
            unshown += piece
            pieces += 1
            if pieces % Self.shownAtOnce == 1 { show() }
        case .done(let report):
            show()
            last { $0.report = report }
            answered?()
        }
    }

    private func show() {
        let text = unshown
        unshown = ""
        last { $0.text += text }
    }

    private func fail(_ error: any Error) {
        failure = error
        last { $0.mistake = error.localizedDescription }
    }

    private func last(_ change: (inout Message) -> Void) {
        if !messages.isEmpty { change(&messages[messages.count - 1]) }
    }

    private func end() {
        show()
        pieces = 0
        task = nil
        if isBusy { state = model == nil ? .noModel : .idle }
    }

    private func append(
        _ author: Message.Author, _ text: String, pictures: Int = 0, mistake: String? = nil
    ) {
        messages.append(
            Message(
                id: next, author: author, text: text, pictures: pictures, report: nil,
                mistake: mistake))
        next += 1
    }
}
