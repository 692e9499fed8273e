// A bundle's folder -> its manifest, its files checked against their hashes, and its packages
// compiled for this device (once: what Core ML compiled is kept in the caches folder) and loaded.

import CoreML
import CryptoKit
import Foundation

public struct ModelBundle: Sendable {
    public let folder: URL
    public let manifest: Manifest

    /// Open a folder that `mlx-vlm-edge export` wrote.
    ///
    /// checkFiles reads every file once to compare it with its sha256; an app with the bundle in
    /// its own signed resources can leave that out.
    public init(folder: URL, checkFiles: Bool = true) throws {
        let url = folder.appending(path: "manifest.json")
        guard let data = try? Data(contentsOf: url) else {
            throw EdgeVLMError(
                "\(url.path): cannot be read; write a bundle with mlx-vlm-edge export")
        }
        let format: Int
        do {
            format = try JSONDecoder().decode(Format.self, from: data).format
        } catch {
            throw EdgeVLMError("\(url.path): not a manifest of a bundle; export it again")
        }
        guard format == Manifest.known else {
            throw EdgeVLMError(
                "\(url.path): format \(format) is not the \(Manifest.known) that this code knows; "
                    + "export it again or update the code")
        }
        do {
            manifest = try JSONDecoder().decode(Manifest.self, from: data)
        } catch {
            throw EdgeVLMError(
                "\(url.path): a value is missing or wrong (\(error)); export it again")
        }
        self.folder = folder
        if checkFiles {
            try check()
        }
    }

    private struct Format: Codable {
        let format: Int
    }

    private func check() throws {
        for (name, expected) in manifest.files {
            let found = try Self.sha256(of: folder.appending(path: name))
            guard found == expected else {
                throw EdgeVLMError(
                    "\(name) is not as it was exported; copy or export the bundle again")
            }
        }
    }

    static func sha256(of file: URL) throws -> String {
        guard let handle = try? FileHandle(forReadingFrom: file) else {
            throw EdgeVLMError("\(file.path): is missing; copy or export the bundle again")
        }
        defer { try? handle.close() }
        var hash = SHA256()
        while let part = try handle.read(upToCount: 1 << 22), !part.isEmpty {
            hash.update(data: part)
        }
        return hex(hash.finalize())
    }

    private static func hex(_ digest: SHA256.Digest) -> String {
        digest.map { String(format: "%02x", $0) }.joined()
    }

    /// A function of a package, loaded for compute units by their name in the manifest.
    ///
    /// function is nil for a package that has only one.
    func load(
        _ package: String, function: FunctionName? = nil, units: String
    ) async throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = try Self.computeUnits(units)
        if let function {
            configuration.functionName = function.rawValue
        }
        let compiled = try await compile(package)
        do {
            return try await MLModel.load(contentsOf: compiled, configuration: configuration)
        } catch {
            throw EdgeVLMError("\(package): Core ML cannot load it: \(error.localizedDescription)")
        }
    }

    private static func computeUnits(_ name: String) throws -> MLComputeUnits {
        switch name {
        case "cpuAndGPU": return .cpuAndGPU
        case "cpuAndNeuralEngine": return .cpuAndNeuralEngine
        default: throw EdgeVLMError("manifest.json: compute units \(name) are not known")
        }
    }

    /// What Core ML compiled of a package, from the caches folder where it is there.
    private func compile(_ package: String) async throws -> URL {
        let hashes = manifest.files.filter { $0.key.hasPrefix(package + "/") }
            .sorted { $0.key < $1.key }
        guard !hashes.isEmpty else {
            throw EdgeVLMError("manifest.json: no files of \(package) are in it; export it again")
        }
        let key = Self.hex(SHA256.hash(data: Data(hashes.map(\.value).joined().utf8)))
        let files = FileManager.default
        do {
            let caches = try files.url(
                for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true
            ).appending(path: "EdgeVLM")
            let kept = caches.appending(path: "\(key).mlmodelc")
            if files.fileExists(atPath: kept.path) {
                return kept
            }
            try files.createDirectory(at: caches, withIntermediateDirectories: true)
            let compiled = try await MLModel.compileModel(at: folder.appending(path: package))
            try files.moveItem(at: compiled, to: kept)
            return kept
        } catch {
            throw EdgeVLMError("\(package): cannot be compiled: \(error.localizedDescription)")
        }
    }
}
