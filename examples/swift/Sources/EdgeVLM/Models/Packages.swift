// A bundle's packages -> compiled for this device (once: what Core ML compiled is kept in the
// caches folder) and loaded, in no actor, so that none waits for it.

import CoreML
import Foundation

/// A model that crosses to the one actor which uses it from then on, and nothing else does.
struct LoadedModel: @unchecked Sendable {
    let model: MLModel
}

/// A step of loading, which may take minutes the first time.
public struct LoadStep: Sendable {
    public let package: String
    /// Packages and their functions that are loaded already, and all of them.
    public let done: Int
    public let total: Int
}

/// Every model of a bundle that a session runs.
struct Packages: Sendable {
    private let models: [String: LoadedModel]

    private static func key(_ package: String, _ function: String) -> String {
        "\(package) \(function)"
    }

    subscript(package: String, function: String) -> MLModel {
        get throws {
            guard let loaded = models[Self.key(package, function)] else {
                throw EdgeVLMError("\(package) has no function \(function)", exportAgain)
            }
            return loaded.model
        }
    }

    /// units: in the place of those that the manifest asks for. A task that is cancelled loads no
    /// further one.
    static func load(
        _ parts: Runnable, of bundle: ModelBundle, units: ComputeUnits?,
        progress: (@Sendable (LoadStep) -> Void)?
    ) async throws -> Packages {
        let wanted = parts.models
        var models: [String: LoadedModel] = [:]
        for (done, entry) in wanted.enumerated() {
            try Task.checkCancellation()
            progress?(LoadStep(package: entry.model.package, done: done, total: wanted.count))
            let units = try units ?? ComputeUnits(manifest: entry.units)
            models[key(entry.model.package, entry.model.function)] = try await load(
                bundle, entry.model, units)
        }
        progress?(LoadStep(package: "", done: wanted.count, total: wanted.count))
        return Packages(models: models)
    }

    private static func load(
        _ bundle: ModelBundle, _ model: Runnable.Model, _ units: ComputeUnits
    ) async throws -> LoadedModel {
        let package = model.package
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units.coreML
        // A package of one function is loaded without a name.
        if model.isNamed {
            configuration.functionName = model.function
        }
        let compiled = try await compile(bundle, package)
        do {
            return LoadedModel(
                model: try await MLModel.load(contentsOf: compiled, configuration: configuration))
        } catch {
            throw EdgeVLMError(
                "\(package): Core ML cannot load it: \(error.localizedDescription)",
                "close other apps, or export for other compute units with --compute")
        }
    }

    /// What Core ML compiled of a package, from the caches folder where it is there.
    private static func compile(_ bundle: ModelBundle, _ package: String) async throws -> URL {
        let kept = try bundle.compiled(package)
        let files = FileManager.default
        if files.fileExists(atPath: kept.path) {
            return kept
        }
        do {
            let compiled = try await MLModel.compileModel(
                at: bundle.folder.appending(path: package))
            try files.moveItem(at: compiled, to: kept)
        } catch {
            if files.fileExists(atPath: kept.path) { return kept }  // by another session meanwhile
            throw EdgeVLMError(
                "\(package): cannot be compiled: \(error.localizedDescription)",
                "free some storage, or export the bundle again")
        }
        return kept
    }
}

/// Where Core ML may run a model.
public enum ComputeUnits: String, Sendable, CaseIterable, Codable {
    case cpuOnly, cpuAndGPU, cpuAndNeuralEngine, all

    init(manifest name: String) throws {
        guard let units = ComputeUnits(rawValue: name) else {
            throw EdgeVLMError(
                "manifest.json: compute units \(name) are not known", "update EdgeVLM")
        }
        self = units
    }

    var coreML: MLComputeUnits {
        switch self {
        case .cpuOnly: return .cpuOnly
        case .cpuAndGPU: return .cpuAndGPU
        case .cpuAndNeuralEngine: return .cpuAndNeuralEngine
        case .all: return .all
        }
    }
}
