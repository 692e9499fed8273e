// The folder of bundles on the device: what is there, what goes, and loading one.

import EdgeVLM
import Foundation

public struct Library: Sendable {
    public let folder: URL

    public struct Entry: Identifiable, Equatable, Sendable {
        public let name: String
        public let url: URL
        public let bytes: Int
        public var id: String { name }
    }

    public init(folder: URL) throws {
        do {
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        } catch {
            throw EdgeVLMError(
                "\(folder.path): cannot be written: \(error.localizedDescription)",
                "free some storage")
        }
        self.folder = folder
    }

    /// Whole bundles, by name.
    public var entries: [Entry] {
        let files = FileManager.default
        let names = (try? files.contentsOfDirectory(atPath: folder.path)) ?? []
        return names.sorted().compactMap { name in
            let url = folder.appending(path: name)
            guard !name.hasSuffix(".partial"),
                files.fileExists(atPath: url.appending(path: "manifest.json").path)
            else { return nil }
            return Entry(name: name, url: url, bytes: Self.bytes(url))
        }
    }

    private static func bytes(_ folder: URL) -> Int {
        let files = FileManager.default
        let paths = (try? files.subpathsOfDirectory(atPath: folder.path)) ?? []
        return paths.reduce(0) { sum, path in
            let found = try? files.attributesOfItem(atPath: folder.appending(path: path).path)
            let isFile = found?[.type] as? FileAttributeType == .typeRegular
            return sum + (isFile ? (found?[.size] as? NSNumber)?.intValue ?? 0 : 0)
        }
    }

    /// The bundle to open: the one that was chosen, or the first where that has gone.
    public func chosen(_ name: String?) -> String? {
        let names = entries.map(\.name)
        return names.first { $0 == name } ?? names.first
    }

    /// Remove a bundle, and what was compiled of it, which takes as much again.
    public func remove(_ entry: Entry) throws {
        try? ModelBundle(folder: entry.url, check: .never).forget()
        try FileManager.default.removeItem(at: entry.url)
    }

    /// Open a bundle and load it; progress is told before each part.
    public func load(
        _ name: String, settings: AppSettings,
        progress: @escaping @Sendable (LoadStep) -> Void
    ) async throws -> Session {
        let bundle = try ModelBundle(folder: folder.appending(path: name))
        let options = Session.Options(system: settings.instructions)
        return try await Session(bundle: bundle, options: options, progress: progress)
    }
}
