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

    public func remove(_ entry: Entry) throws {
        try FileManager.default.removeItem(at: entry.url)
    }

    /// Open a bundle and load it; progress is told before each part.
    public func load(
        _ name: String, settings: Settings,
        progress: @escaping @Sendable (LoadStep) -> Void
    ) async throws -> Session {
        let bundle = try ModelBundle(folder: folder.appending(path: name))
        let system = settings.system.trimmingCharacters(in: .whitespacesAndNewlines)
        let options = Session.Options(system: system.isEmpty ? nil : system)
        return try await Session(bundle: bundle, options: options, progress: progress)
    }
}
