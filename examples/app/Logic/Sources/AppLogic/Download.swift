// A bundle on a server -> the same in the app's folder: manifest first, then each file, from where
// a broken one ended, checked against its hash. Nothing is a bundle before all of it is there.

import EdgeVLM
import Foundation

/// Where bytes come from; `URLSessionTransport` is the network.
public protocol Transport: Sendable {
    /// The bytes from `offset` on. Where the other side sends all from the beginning, it says so.
    func get(_ url: URL, from offset: Int) async throws -> Incoming
}

public struct Incoming: Sendable {
    /// Where the bytes begin, `offset` or 0.
    public let start: Int
    public let bytes: AsyncThrowingStream<Data, Error>

    public init(start: Int, bytes: AsyncThrowingStream<Data, Error>) {
        self.start = start
        self.bytes = bytes
    }
}

public struct DownloadProgress: Equatable, Sendable {
    public let file: String
    /// Files that are there and right, and all of them.
    public let done: Int
    public let total: Int
    /// Of this file.
    public let bytes: Int
    /// Bytes of all files that are there, and of all there will be; 0 where the bundle does not
    /// say.
    public let received: Int
    public let expected: Int

    /// Of the whole, 0 to 1.
    public var fraction: Double {
        if expected > 0 { return min(1, Double(received) / Double(expected)) }
        return total > 0 ? Double(done) / Double(total) : 0
    }
}

public actor Downloader {
    private let transport: any Transport
    private let folder: URL
    private static let manifest = "manifest.json"

    /// folder: where bundles are, a folder each.
    public init(transport: any Transport, folder: URL) {
        self.transport = transport
        self.folder = folder
    }

    private struct Listed: Decodable {
        let files: [String: String]
        let memory: Memory?
        let parts: [String: Part]?

        /// files: bytes of all of them.
        struct Memory: Decodable {
            let files: Int
        }

        struct Part: Decodable {
            let memory: Memory?

            struct Memory: Decodable {
                let package: Int?
            }
        }

        /// Bytes of the packages, which Core ML will compile into as much again.
        var compiled: Int {
            (parts ?? [:]).values.reduce(0) { $0 + ($1.memory?.package ?? 0) }
        }
    }

    /// Download a bundle's folder at a URL; its folder here. Called again, it goes on.
    ///
    /// Raises EdgeVLMError for a name that is none of a folder, an answer that is no bundle, a
    /// bundle for which the storage is too small, and a file that has not its hash.
    public func download(
        _ url: URL, as name: String,
        progress: @escaping @Sendable (DownloadProgress) -> Void
    ) async throws -> URL {
        guard Self.isInside(name), !name.contains("/") else {
            throw EdgeVLMError(
                "\(url): has no folder's name", "give the address of a bundle's folder")
        }
        let target = folder.appending(path: name)
        let files = FileManager.default
        if files.fileExists(atPath: target.appending(path: Self.manifest).path) { return target }
        let partial = folder.appending(path: name + ".partial")
        try files.createDirectory(at: partial, withIntermediateDirectories: true)
        let manifest = partial.appending(path: Self.manifest)
        try? files.removeItem(at: manifest)  // it may be of another day
        try await fetch(url.appending(path: Self.manifest), manifest) { _ in }
        guard let data = try? Data(contentsOf: manifest),
            let listed = try? JSONDecoder().decode(Listed.self, from: data)
        else {
            try? files.removeItem(at: manifest)
            throw EdgeVLMError("\(url): is no bundle", "give the address of a bundle's folder")
        }
        let names = listed.files.keys.sorted()
        if let odd = names.first(where: { !Self.isInside($0) }) {
            throw EdgeVLMError("\(odd) is no file of a bundle", "download another bundle")
        }
        let expected = listed.memory?.files ?? 0
        let here = names.reduce(0) { $0 + size(partial, $1) }
        try checkRoom(for: expected - here + listed.compiled)
        var received = 0
        for (done, file) in names.enumerated() {
            guard let hash = listed.files[file] else { continue }
            let tell = { [received] (bytes: Int) in
                progress(
                    DownloadProgress(
                        file: file, done: done, total: names.count, bytes: bytes,
                        received: received + bytes, expected: expected))
            }
            let place = partial.appending(path: file)
            try await fetchChecked(url.appending(path: file), place, hash, tell)
            received += size(partial, file)
        }
        try files.moveItem(at: partial, to: target)
        progress(
            DownloadProgress(
                file: "", done: names.count, total: names.count, bytes: 0, received: received,
                expected: expected))
        return target
    }

    /// Bytes of a file, or of what there is of it.
    private func size(_ folder: URL, _ file: String) -> Int {
        let files = FileManager.default
        let path = folder.appending(path: file).path
        let found = [path, path + ".part"].compactMap { try? files.attributesOfItem(atPath: $0) }
        return (found.first?[.size] as? NSNumber)?.intValue ?? 0
    }

    private func checkRoom(for bytes: Int) throws {
        let attributes = try? FileManager.default.attributesOfFileSystem(forPath: folder.path)
        guard let free = (attributes?[.systemFreeSize] as? NSNumber)?.intValue, free < bytes else {
            return
        }
        throw EdgeVLMError(
            "the bundle, and what is compiled of it, take \(bytes / 1_000_000) MB more, "
                + "\(free / 1_000_000) MB are free",
            "free some storage")
    }

    /// Whether a path of a manifest stays in its folder.
    static func isInside(_ path: String) -> Bool {
        let parts = path.split(separator: "/", omittingEmptySubsequences: false)
        return !path.isEmpty && !parts.contains { $0.isEmpty || $0 == ".." || $0 == "." }
    }

    private func fetchChecked(
        _ url: URL, _ place: URL, _ hash: String, _ progress: (Int) -> Void
    ) async throws {
        let files = FileManager.default
        if files.fileExists(atPath: place.path), try ModelBundle.sha256(of: place) == hash {
            return
        }
        try files.createDirectory(
            at: place.deletingLastPathComponent(), withIntermediateDirectories: true)
        try? files.removeItem(at: place)
        let part = place.appendingPathExtension("part")
        try await fetch(url, part, progress)
        guard try ModelBundle.sha256(of: part) == hash else {
            try? files.removeItem(at: part)
            throw EdgeVLMError("\(url.lastPathComponent): came damaged", "download it again")
        }
        try files.moveItem(at: part, to: place)
    }

    /// Bytes behind those that are in the file already.
    private func fetch(_ url: URL, _ part: URL, _ progress: (Int) -> Void) async throws {
        let files = FileManager.default
        if !files.fileExists(atPath: part.path) {
            guard files.createFile(atPath: part.path, contents: nil) else {
                throw EdgeVLMError("\(part.path): cannot be written", "free some storage")
            }
        }
        let handle = try FileHandle(forWritingTo: part)
        defer { try? handle.close() }
        let offset = Int(try handle.seekToEnd())
        let incoming = try await transport.get(url, from: offset)
        if incoming.start != offset {
            try handle.truncate(atOffset: 0)
        }
        var count = incoming.start
        for try await bytes in incoming.bytes {
            try Task.checkCancellation()
            try handle.write(contentsOf: bytes)
            count += bytes.count
            progress(count)
        }
        try Task.checkCancellation()
    }
}
