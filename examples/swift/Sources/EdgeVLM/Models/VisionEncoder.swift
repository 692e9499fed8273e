// A picture -> visual tokens, as they stand among the input embeddings: the vision part, and behind
// it the connector where that is a package of its own.

import CoreML
import Foundation

final class VisionEncoder {
    private let vision: MLModel
    private let connector: MLModel?
    private let input: Manifest.Port
    let preprocessing: Manifest.Preprocessing

    init(_ parts: Runnable, packages: Packages) throws {
        input = parts.image
        preprocessing = parts.preprocessing
        vision = try packages[parts.vision.package, parts.function]
        connector = try parts.connector.map { try packages[$0.package, parts.function] }
    }

    /// Visual tokens of a picture in the model's size, a row each.
    func encode(_ raster: Raster) throws -> Rows {
        var tokens = try see(raster)
        if let connector { tokens = try connect(tokens, connector) }
        guard let width = tokens.shape.last?.intValue else {
            throw EdgeVLMError("the vision part gave no visual tokens", exportAgain)
        }
        return Rows(width: width, values: try tokens.halves(VisionName.visualTokens.rawValue))
    }

    /// Each package on its trial, which is of the first size of pictures, or else on a blank one.
    func tryOut(_ parts: Runnable, in folder: URL) throws {
        guard parts.function == FunctionName.main.rawValue else {
            _ = try encode(blank)
            return
        }
        let seen = connector == nil ? VisionName.visualTokens : .imageFeatures
        if let trial = try TrialFile(parts.vision.trial, of: parts.vision.package, in: folder) {
            try trial.check(see(trial.raster()), seen)
        } else {
            _ = try encode(blank)
        }
        guard let connector, let part = parts.connector else { return }
        if let trial = try TrialFile(part.trial, of: part.package, in: folder) {
            let features = try trial.array(.imageFeatures)
            try trial.check(connect(features, connector), .visualTokens)
        }
    }

    private var blank: Raster {
        Raster(width: preprocessing.width, height: preprocessing.height, fill: [0, 0, 0])
    }

    /// A picture -> image features, or visual tokens where the connector is fused behind them.
    private func see(_ raster: Raster) throws -> MLMultiArray {
        let picture: MLFeatureValue
        if input.kind == "image" {
            picture = MLFeatureValue(pixelBuffer: try PixelReader.buffer(raster))
        } else {
            picture = MLFeatureValue(multiArray: try tensor(Self.planes(raster)))
        }
        let outputs = try run(vision, [VisionName.image.rawValue: picture])
        return try Self.array(outputs, connector == nil ? .visualTokens : .imageFeatures)
    }

    private func connect(_ features: MLMultiArray, _ connector: MLModel) throws -> MLMultiArray {
        let value = MLFeatureValue(multiArray: features)
        let outputs = try run(connector, [VisionName.imageFeatures.rawValue: value])
        return try Self.array(outputs, .visualTokens)
    }

    /// Red, green and blue planes of 0..255, one after the other.
    private static func planes(_ raster: Raster) -> [Float] {
        let count = raster.width * raster.height
        var planes = [Float](repeating: 0, count: 3 * count)
        for pixel in 0..<count {
            for channel in 0..<3 {
                planes[channel * count + pixel] = Float(raster.rgb[3 * pixel + channel])
            }
        }
        return planes
    }

    private func tensor(_ planes: [Float]) throws -> MLMultiArray {
        guard planes.count == input.shape.reduce(1, *) else {
            throw EdgeVLMError(
                "manifest.json: the preprocessing's size is not the vision part's", exportAgain)
        }
        if input.dtype == "fp16" {
            return try MLMultiArray.half(input.shape, values: planes.map { Float16($0) })
        }
        let shape = input.shape.map { NSNumber(value: $0) }
        let array = try MLMultiArray(shape: shape, dataType: .float32)
        array.withUnsafeMutableBytes { bytes, _ in
            planes.withUnsafeBytes { bytes.copyMemory(from: $0) }
        }
        return array
    }

    private func run(
        _ model: MLModel, _ inputs: [String: MLFeatureValue]
    ) throws -> MLFeatureProvider {
        do {
            return try model.prediction(from: MLDictionaryFeatureProvider(dictionary: inputs))
        } catch {
            throw EdgeVLMError(
                "Core ML could not encode the picture: \(error.localizedDescription)",
                "close other apps, or export for other compute units with --compute")
        }
    }

    private static func array(
        _ outputs: MLFeatureProvider, _ name: VisionName
    ) throws -> MLMultiArray {
        guard let array = outputs.featureValue(for: name.rawValue)?.multiArrayValue else {
            throw EdgeVLMError("the package gave no \(name.rawValue)", exportAgain)
        }
        return array
    }
}
