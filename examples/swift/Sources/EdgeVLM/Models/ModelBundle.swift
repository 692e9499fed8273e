// A bundle's folder -> its manifest, and its files checked against their hashes, once for each
// state that the folder is in.

import CryptoKit
import Foundation

public struct ModelBundle: Sendable {
    public let folder: URL
    public let manifest: Manifest
    /// Where what is compiled and remembered of bundles is kept.
    let caches: URL

    public enum FileCheck: Sendable {
        /// Read every file, unless one has been found right and has not been touched since.
        case once
        case always
        /// For a bundle in the app's own signed resources.
        case never
    }

    /// Open a folder that `mlx-vlm-edge export` wrote.
    public init(folder: URL, check: FileCheck = .once) throws {
        let url = folder.appending(path: "manifest.json")
        guard let data = try? Data(contentsOf: url) else {
            throw EdgeVLMError(
                "\(url.path): cannot be read", "write a bundle with mlx-vlm-edge export")
        }
        let format: Int
        do {
            format = try JSONDecoder().decode(Format.self, from: data).format
        } catch {
            throw EdgeVLMError("\(url.path): not a manifest of a bundle", exportAgain)
        }
        guard format == Manifest.known else {
            throw EdgeVLMError(
                "\(url.path): format \(format) is not the \(Manifest.known) that EdgeVLM knows",
                "export the bundle again, or update EdgeVLM")
        }
        do {
            manifest = try JSONDecoder().decode(Manifest.self, from: data)
        } catch {
            throw EdgeVLMError("\(url.path): a value is missing or wrong (\(error))", exportAgain)
        }
        self.folder = folder
        caches = try Self.cachesFolder()
        if check != .never {
            try checkFiles(trusting: check == .once)
        }
    }

    private struct Format: Codable {
        let format: Int
    }

    private static func cachesFolder() throws -> URL {
        let files = FileManager.default
        do {
            let folder = try files.url(
                for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true
            ).appending(path: "EdgeVLM")
            try files.createDirectory(at: folder, withIntermediateDirectories: true)
            return folder
        } catch {
            throw EdgeVLMError(
                "the caches folder cannot be written: \(error.localizedDescription)",
                "free some storage")
        }
    }

    /// Let go of what is kept of this bundle outside its folder, before that is removed: what Core
    /// ML compiled, what was checked, what was found out. Another bundle of the same packages
    /// compiles them anew.
    public func forget() {
        let parts = manifest.parts
        let packages = [parts.vision?.package, parts.connector?.package, parts.decoder?.package]
        let compiled = packages.compactMap { $0 }.map { try? self.compiled($0) }
        for url in compiled + [try? stamp()] + Trial(self).files {
            if let url { try? FileManager.default.removeItem(at: url) }
        }
    }

    /// Where what Core ML compiles of a package is kept.
    func compiled(_ package: String) throws -> URL {
        let hashes = manifest.files.filter { $0.key.hasPrefix(package + "/") }
            .sorted { $0.key < $1.key }
        guard !hashes.isEmpty else {
            throw EdgeVLMError("manifest.json: no files of \(package) are in it", exportAgain)
        }
        let key = Self.digest(hashes.map(\.value).joined())
        return caches.appending(path: "\(key).mlmodelc")
    }

    /// A file that is there when the folder, as it is, was found right.
    private func stamp() throws -> URL { caches.appending(path: "\(try state()).verified") }

    private func checkFiles(trusting: Bool) throws {
        let stamp = try stamp()
        if trusting, FileManager.default.fileExists(atPath: stamp.path) { return }
        for (name, expected) in manifest.files.sorted(by: { $0.key < $1.key }) {
            guard try Self.sha256(of: folder.appending(path: name)) == expected else {
                throw EdgeVLMError(
                    "\(name) is not as it was exported", "copy or export the bundle again")
            }
        }
        try? Data().write(to: stamp)
    }

    /// A name for the folder's place, hashes, sizes and times of change.
    private func state() throws -> String {
        var text = folder.standardizedFileURL.path
        for (name, hash) in manifest.files.sorted(by: { $0.key < $1.key }) {
            let path = folder.appending(path: name).path
            guard let found = try? FileManager.default.attributesOfItem(atPath: path) else {
                throw EdgeVLMError("\(path): is missing", "copy or export the bundle again")
            }
            let time = (found[.modificationDate] as? Date)?.timeIntervalSince1970 ?? 0
            text += "|\(name) \(hash) \(found[.size] ?? 0) \(time)"
        }
        return Self.digest(text)
    }

    static func digest(_ text: String) -> String { hex(SHA256.hash(data: Data(text.utf8))) }

    /// The sha256 of a file, in hex.
    public static func sha256(of file: URL) throws -> String {
        guard let handle = try? FileHandle(forReadingFrom: file) else {
            throw EdgeVLMError("\(file.path): is missing", "copy or export the bundle again")
        }
        defer { try? handle.close() }
        var hash = SHA256()
        do {
            while let part = try handle.read(upToCount: 1 << 22), !part.isEmpty {
                hash.update(data: part)
            }
        } catch {
            throw EdgeVLMError(
                "\(file.path): cannot be read: \(error.localizedDescription)",
                "copy or export the bundle again")
        }
        return hex(hash.finalize())
    }

    private static func hex(_ digest: SHA256.Digest) -> String {
        digest.map { String(format: "%02x", $0) }.joined()
    }

    /// Bytes of the files whose path begins so.
    func bytes(of prefix: String) -> Int {
        manifest.files.keys.filter { $0 == prefix || $0.hasPrefix(prefix + "/") }.reduce(0) {
            let path = folder.appending(path: $1).path
            let found = try? FileManager.default.attributesOfItem(atPath: path)
            return $0 + ((found?[.size] as? NSNumber)?.intValue ?? 0)
        }
    }
}
