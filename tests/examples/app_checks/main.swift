// NAME [ARGUMENT...] -> one JSON object: what the app's logic does in a situation that the test names.

import AppLogic
import Foundation

@testable import EdgeVLM

/// Answers by a script: pieces, and then how it ends. Counts what it is asked.
actor Actor: Answering {
    private(set) var resets = 0
    private(set) var unloads = 0

    nonisolated func ask(
        _ question: String, pictures: [Picture], options: AnswerOptions
    ) -> AsyncThrowingStream<AnswerEvent, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                continuation.yield(.stage(StageTime(stage: .vision, seconds: 0.3, count: 1)))
                continuation.yield(.stage(StageTime(stage: .prefill, seconds: 0.1, count: 9)))
                if question == "and now?" { continuation.yield(.dropped(turns: 2)) }
                for piece in ["\(pictures.count)", " pic", "tures", " of", " ", question] {
                    continuation.yield(.text(piece))
                }
                if question == "for ever" {
                    while !Task.isCancelled { try await Task.sleep(for: .milliseconds(1)) }
                }
                if question == "fail" {
                    continuation.finish(throwing: EdgeVLMError("it broke", "mend it"))
                    return
                }
                continuation.yield(
                    .done(
                        AnswerReport(
                            reusedTokens: 0, promptTokens: 9, visualTokens: 4,
                            tokens: [1, 2, options.maxTokens], stages: [], finish: .end)))
                continuation.finish()
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    func reset() { resets += 1 }
    func forgetPictures() {}
    func unload() { unloads += 1 }
}

/// What an earlier run left, turns that are dropped, and a shortcut's question.
@MainActor
func restored(_ folder: String) async throws -> Data {
    let file = URL(fileURLWithPath: folder).appendingPathComponent("chat.json")
    let history = History(file: file)
    let none = history.messages.count
    let before = Chat()
    before.loaded(Actor())
    before.ask("and now?")
    await before.finish()
    history.save(before.messages)
    let chat = Chat()
    chat.restore(history.messages)
    let shown = chat.messages.map { "\($0.id) \($0.text) \($0.isEarlier) \($0.note ?? "")" }
    chat.restore([])
    var mistakes: [String] = []
    func shortcut(_ question: String) async -> String {
        do {
            let picture = try Picture(width: 1, height: 1, rgb: [1, 2, 3])
            return try await chat.answer(question, about: picture)
        } catch {
            mistakes.append(error.localizedDescription)
            return ""
        }
    }
    _ = await shortcut("what?")
    chat.loaded(Actor())
    chat.ask("more?")
    let ids = chat.messages.map(\.id)
    _ = await shortcut("what?")
    await chat.finish()
    _ = await shortcut("fail")
    _ = await shortcut("  ")
    let answer = await shortcut("what?")
    let together = try await twoShortcuts(chat)
    let stopped = Task { @MainActor in await shortcut("for ever") }
    while chat.state != .answering { try await Task.sleep(for: .milliseconds(1)) }
    await chat.newConversation()
    _ = await stopped.value
    try Data("{".utf8).write(to: file)
    return try json([
        "none": none, "shown": shown, "ids": ids, "mistakes": mistakes, "answer": answer,
        "together": together, "damaged": history.messages.count, "left": chat.attached.count,
    ])
}

/// What two shortcuts are told that begin together.
@MainActor
func twoShortcuts(_ chat: Chat) async throws -> [String] {
    let picture = try Picture(width: 1, height: 1, rgb: [1, 2, 3])
    let asked = ["one?", "other?"].map { question in
        Task { @MainActor in
            do {
                return try await chat.answer(question, about: picture)
            } catch {
                return error.localizedDescription
            }
        }
    }
    var told: [String] = []
    for task in asked { told.append(await task.value) }
    return told
}

@MainActor
func chat() async throws -> Data {
    let chat = Chat()
    let model = Actor()
    var answered = 0
    chat.answered = { answered += 1 }
    var asked = [chat.ask("too early")]
    var states = ["\(chat.state)"]
    chat.loaded(model)
    states.append("\(chat.state)")
    asked.append(chat.ask("  "))
    let picture = try Picture(width: 1, height: 1, rgb: [1, 2, 3])
    chat.attach(picture)
    chat.attach(picture)
    chat.detach(5)
    chat.settings.maxTokens = 7
    asked.append(chat.ask(" what? "))
    states.append("\(chat.state)")
    asked.append(chat.ask("while it answers"))
    await chat.finish()
    states.append("\(chat.state)")
    chat.ask("fail")
    await chat.finish()
    chat.ask("for ever")
    while chat.state != .answering { try await Task.sleep(for: .milliseconds(1)) }
    await chat.stop()
    states.append("\(chat.state)")
    let messages = chat.messages.map {
        ["\($0.author)", $0.text, "\($0.pictures)", $0.mistake ?? "", "\($0.report?.tokens ?? [])"]
    }
    let bar = StageBar(chat.stages)
    await chat.newConversation()
    let cleared = chat.messages.isEmpty
    await chat.unload()
    states.append("\(chat.state)")
    return try json([
        "states": states, "messages": messages, "cleared": cleared, "resets": await model.resets,
        "unloads": await model.unloads, "spoken": bar.spoken,
        "answered": answered, "asked": asked,
        "shares": bar.parts.map { ($0.share * 100).rounded() },
    ])
}

/// Models that are chosen while another one loads: one at a time, and the last is there.
@MainActor
func loading() async throws -> Data {
    let chat = Chat()
    let told = Told()
    func load(_ name: String, ends: Bool) -> Task<Void, Never> {
        Task { @MainActor in
            await chat.load { progress in
                told.add("\(name) begins")
                defer { told.add("\(name) ends") }
                progress(LoadStep(package: name, done: 1, total: 3))
                while !ends { try await Task.sleep(for: .milliseconds(1)) }
                Task {  // late, when nothing loads any more
                    try await Task.sleep(for: .milliseconds(50))
                    progress(LoadStep(package: name, done: 2, total: 3))
                }
                if name == "damaged" { throw EdgeVLMError("it is damaged", "export it again") }
                return Actor()
            }
        }
    }
    let first = load("one", ends: false)
    while chat.state != .loading(done: 1, total: 3) { try await Task.sleep(for: .milliseconds(1)) }
    let others = [load("two", ends: false), load("three", ends: true)]
    for task in [first] + others { await task.value }
    var states = ["\(chat.state)"]
    let quiet = chat.messages.count
    chat.ask("what?")
    await chat.finish()
    await load("damaged", ends: true).value
    states.append("\(chat.state)")
    let fourth = load("four", ends: false)
    while chat.state != .loading(done: 1, total: 3) { try await Task.sleep(for: .milliseconds(1)) }
    await chat.unload()
    await fourth.value
    states.append("\(chat.state)")
    await load("five", ends: true).value
    try await Task.sleep(for: .milliseconds(100))
    states.append("\(chat.state)")
    return try json([
        "told": told.all, "states": states, "quiet": quiet,
        "messages": chat.messages.map { "\($0.text)\($0.mistake ?? "") \($0.isEarlier)" },
    ])
}

/// The bundles in FOLDER: which is opened, and what is left once the first has gone.
func library(_ folder: String) throws -> [String: Any] {
    let library = try Library(folder: URL(fileURLWithPath: folder, isDirectory: true))
    let names = [nil, "b", "gone"].map { library.chosen($0) ?? "none" }
    if let first = library.entries.first { try library.remove(first) }
    return ["chosen": names, "left": library.entries.map(\.name)]
}

func json(_ object: [String: Any]) throws -> Data {
    try JSONSerialization.data(withJSONObject: object)
}

/// Frames while the first is looked at, then a slower pace and a pause; time goes by a counter.
func captions() async throws -> [String: Any] {
    let clock = Counter()
    let told = Told()
    let gate = Gate()
    let captions = Captions<Int>(
        now: { clock.value },
        describe: { frame in
            await gate.wait()
            if frame == 13 { throw EdgeVLMError("no luck", "another frame") }
            clock.add(0.5)
            return "frame \(frame)"
        },
        tell: { told.add("\($0.text) \($0.rate) \($0.dropped)") })
    for frame in 1...4 { await captions.take(frame) }
    await gate.open()
    await captions.idle()
    await captions.slow(to: 10)
    await captions.take(5)
    clock.add(20)
    await captions.take(6)
    await captions.idle()
    clock.add(20)
    await captions.take(13)
    await captions.idle()
    let mistake = await captions.mistake ?? ""
    await captions.slow(to: nil)
    clock.add(20)
    await captions.take(7)
    await captions.stop()
    return ["told": told.all, "mistake": mistake]
}

final class Counter: @unchecked Sendable {
    private let lock = NSLock()
    private var seconds = 0.0
    var value: Double { lock.withLock { seconds } }
    func add(_ more: Double) { lock.withLock { seconds += more } }
}

final class Told: @unchecked Sendable {
    private let lock = NSLock()
    private var lines: [String] = []
    func add(_ line: String) { lock.withLock { lines.append(line) } }
    var all: [String] { lock.withLock { lines } }
}

actor Gate {
    private var waiting: [CheckedContinuation<Void, Never>] = []
    private var isOpen = false
    func wait() async {
        if !isOpen { await withCheckedContinuation { waiting.append($0) } }
    }
    func open() {
        isOpen = true
        waiting.forEach { $0.resume() }
        waiting = []
    }
}

func pressure() -> [String: Any] {
    var pressure = Pressure()
    var steps: [String] = []
    for heat in [Heat.nominal, .fair, .serious, .critical, .critical, .nominal] {
        steps.append("\(pressure.became(heat))")
    }
    let first = pressure.memoryWarning(busy: false)
    let busy = pressure.memoryWarning(busy: true)
    let second = pressure.memoryWarning(busy: false)
    pressure.calm()
    return [
        "heat": steps, "first": first == [.forgetPictures], "busy": busy == [.forgetPictures],
        "second": second.contains(.unload), "calm": pressure.memoryWarning(busy: false).count,
    ]
}

func settings() -> [String: Any] {
    guard let defaults = UserDefaults(suiteName: "edge-test") else { return [:] }
    var settings = AppSettings.kept(in: defaults)
    let plain = settings == AppSettings()
    settings.temperature = -3
    settings.topP = 2
    settings.maxTokens = 0
    settings.keep(in: defaults)
    let same = AppSettings.kept(in: defaults) == settings
    let options = settings.options
    let none = settings.instructions ?? "none"
    settings.system = " Be brief. "
    settings.presetLines = "what?\n\n where? \nwhat?"
    defaults.set(Data("?".utf8), forKey: "settings")
    return [
        "plain": plain, "same": same, "broken": AppSettings.kept(in: defaults) == AppSettings(),
        "instructions": [none, settings.instructions ?? ""], "presets": settings.shownPresets, "lines": settings.presetLines,
        "options": ["\(options.temperature)", "\(options.topP)", "\(options.maxTokens)"],
    ]
}

/// Downloads ADDRESS into FOLDER as NAME as often as it takes, at most four times.
func download(_ address: String, _ folder: String, _ name: String) async throws -> [String: Any] {
    guard let url = URL(string: address) else { return [:] }
    let told = Told()
    let shares = Told()
    let home = URL(fileURLWithPath: folder, isDirectory: true)
    let library = try Library(folder: home)
    let downloader = Downloader(transport: URLSessionTransport(), folder: library.folder)
    var mistakes: [String] = []
    for _ in 0..<4 {
        do {
            _ = try await downloader.download(url, as: name) { progress in
                told.add("\(progress.done)/\(progress.total)")
                shares.add("\(progress.fraction)")
            }
            break
        } catch let error as EdgeVLMError {
            mistakes.append(error.description)
            if library.entries.count > 0 { mistakes.append("half a bundle is listed") }
        } catch {
            mistakes.append("broken off")
        }
    }
    return [
        "mistakes": mistakes, "last": told.all.last ?? "", "shares": shares.all,
        "entries": library.entries.map { "\($0.name) \($0.bytes)" },
    ]
}

func told() async throws -> Data {
    let words = CommandLine.arguments
    switch words[1] {
    case "chat": return try await chat()
    case "restored": return try await restored(words[2])
    case "captions": return try json(try await captions())
    case "loading": return try await loading()
    case "library": return try json(try library(words[2]))
    case "pressure": return try json(pressure())
    case "settings": return try json(settings())
    default: return try json(try await download(words[2], words[3], words[4]))
    }
}

FileHandle.standardOutput.write(try await told())
