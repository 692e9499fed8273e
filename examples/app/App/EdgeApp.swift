// The app's one window, and what the system tells it of heat and memory.

import AppLogic
import EdgeVLM
import SwiftUI

@main
struct EdgeApp: App {
    @State private var host = Host.shared
    @Environment(\.scenePhase) private var phase

    var body: some Scene {
        WindowGroup {
            ChatView(host: host)
                .task { await host.start() }
        }
        .onChange(of: phase) { _, phase in
            if phase != .active { host.save() }
        }
    }
}

/// The chat, the bundles, and the way between them.
@MainActor
@Observable
final class Host {
    /// The window's, and the shortcut's.
    static let shared = Host()

    let chat = Chat(settings: .kept(in: .standard))
    private(set) var library: Library?
    private(set) var entries: [Library.Entry] = []
    private(set) var notice: String?
    private(set) var download: DownloadProgress?
    /// One download at a time: two would write into the same file.
    private(set) var isFetching = false
    private(set) var captionInterval: Double? = 0
    /// Of the model that is loaded, or being loaded.
    private var instructions: String?
    private var pressure = Pressure()
    private var memory: (any DispatchSourceMemoryPressure)?
    private var starting: Task<Void, Never>?
    private let history = History(file: .applicationSupportDirectory.appending(path: "chat.json"))

    /// Once, whoever comes first; the others wait for it.
    func start() async {
        let task = starting ?? Task { await open() }
        starting = task
        await task.value
    }

    func save() {
        history.save(chat.messages)
        chat.settings.keep(in: .standard)
    }

    /// A shortcut's question, in a new conversation.
    func answer(_ question: String, about data: Data) async throws -> String {
        let picture = try Picture(data: data)
        await start()
        return try await chat.answer(question, about: picture)
    }

    private func open() async {
        do {
            let folder = URL.applicationSupportDirectory.appending(path: "Bundles")
            library = try Library(folder: folder)
        } catch {
            chat.failed(error)
        }
        chat.restore(history.messages)
        chat.answered = { [weak self] in
            self?.pressure.calm()
            self?.save()
        }
        watch()
        list()
        if let name = library?.chosen(chat.settings.bundle) { await load(name) }
    }

    private func list() { entries = library?.entries ?? [] }

    func load(_ name: String) async {
        guard let library else { return }
        notice = nil
        chat.settings.bundle = name
        chat.settings.keep(in: .standard)
        let settings = chat.settings
        instructions = settings.instructions
        await chat.load { try await library.load(name, settings: settings, progress: $0) }
    }

    /// The settings were closed, by their button or by a swipe. A session keeps the instructions
    /// that it was opened with, so that others need another one.
    func settle() async {
        chat.settings.keep(in: .standard)
        guard let name = chat.settings.bundle, chat.model != nil || chat.isLoading,
            chat.settings.instructions != instructions
        else { return }
        await load(name)
    }

    func remove(_ entry: Library.Entry) async {
        if chat.settings.bundle == entry.name {
            chat.settings.bundle = nil  // before another can be chosen
            chat.settings.keep(in: .standard)
            await chat.unload()
        }
        do {
            try library?.remove(entry)
        } catch {
            notice = error.localizedDescription
        }
        list()
    }

    func fetch(_ address: String) async {
        guard let library, let url = URL(string: address), url.scheme?.hasPrefix("http") == true
        else {
            notice = "An address begins with https://"
            return
        }
        guard !isFetching else { return }
        isFetching = true
        var target: URL?
        do {
            let downloader = Downloader(transport: URLSessionTransport(), folder: library.folder)
            target = try await downloader.download(url, as: url.lastPathComponent) { progress in
                Task { @MainActor in
                    if self.isFetching { self.download = progress }  // it may come late
                }
            }
        } catch {
            notice = error.localizedDescription
        }
        isFetching = false
        download = nil
        list()
        if let target { await load(target.lastPathComponent) }
    }

    private func watch() {
        let center = NotificationCenter.default
        let heat = ProcessInfo.thermalStateDidChangeNotification
        _ = center.addObserver(forName: heat, object: nil, queue: .main) { [weak self] _ in
            Task { @MainActor in
                let state = ProcessInfo.processInfo.thermalState.rawValue
                await self?.apply { $0.became(Heat(rawValue: state) ?? .nominal) }
            }
        }
        let source = DispatchSource.makeMemoryPressureSource(
            eventMask: [.warning, .critical], queue: .main)
        source.setEventHandler { [weak self] in
            Task { @MainActor in
                let busy = self.map { $0.chat.isBusy || $0.chat.isLoading } ?? false
                await self?.apply { $0.memoryWarning(busy: busy) }
            }
        }
        source.resume()
        memory = source
    }

    private func apply(_ change: (inout Pressure) -> [Pressure.Step]) async {
        for step in change(&pressure) {
            switch step {
            case .captions(let every): captionInterval = every
            case .forgetPictures: await chat.model?.forgetPictures()
            case .unload: await chat.unload()
            case .tell(let text): notice = text
            }
        }
    }
}
