// A picture -> visual tokens, as they stand among the input embeddings: the vision part, and behind
// it the connector where that is a package of its own.

import CoreGraphics
import CoreML
import Foundation

public final class VisionEncoder {
    private let vision: MLModel
    private let connector: MLModel?
    private let input: Manifest.Port
    private let preprocessing: Manifest.Preprocessing

    init(bundle: ModelBundle) async throws {
        let manifest = bundle.manifest
        guard let entry = manifest.parts.vision, let preprocessing = manifest.preprocessing else {
            throw EdgeVLMError("the bundle has no vision part; export it with --part all")
        }
        guard entry.tiles != true else {
            throw EdgeVLMError("this model takes pictures in tiles, which this code does not cut")
        }
        let main = try VisionEncoder.main(entry)
        guard let input = main.inputs.first(where: { $0.name == VisionName.image.rawValue }) else {
            throw EdgeVLMError("manifest.json: the vision part takes no picture; export it again")
        }
        self.input = input
        self.preprocessing = preprocessing
        vision = try await bundle.load(entry.package, units: entry.computeUnits)
        if main.outputs.contains(where: { $0.name == VisionName.visualTokens.rawValue }) {
            connector = nil
            return
        }
        guard let behind = manifest.parts.connector else {
            throw EdgeVLMError("the bundle has no connector; export it with --part all")
        }
        connector = try await bundle.load(behind.package, units: behind.computeUnits)
    }

    private static func main(_ entry: Manifest.EncoderPart) throws -> Manifest.Function {
        guard let main = entry.functions[FunctionName.main.rawValue] else {
            throw EdgeVLMError("manifest.json: \(entry.package) has no function main")
        }
        return main
    }

    /// Visual tokens of a picture, a row each.
    public func encode(_ image: CGImage) throws -> Rows {
        let pixels = try Picture.pixelBuffer(image, preprocessing)
        let picture: MLFeatureValue
        if input.kind == "image" {
            picture = MLFeatureValue(pixelBuffer: pixels)
        } else {
            picture = MLFeatureValue(multiArray: try tensor(try Picture.planes(pixels)))
        }
        var found = try run(vision, [VisionName.image.rawValue: picture])
        if let connector {
            let features = try Self.array(found, VisionName.imageFeatures)
            let value = MLFeatureValue(multiArray: features)
            found = try run(connector, [VisionName.imageFeatures.rawValue: value])
        }
        let tokens = try Self.array(found, VisionName.visualTokens)
        guard let width = tokens.shape.last?.intValue else {
            throw EdgeVLMError("the vision part gave no visual tokens")
        }
        return Rows(width: width, values: try tokens.halves(VisionName.visualTokens.rawValue))
    }

    private func tensor(_ planes: [Float]) throws -> MLMultiArray {
        guard planes.count == input.shape.reduce(1, *) else {
            throw EdgeVLMError("manifest.json: the preprocessing's size is not the vision part's")
        }
        if input.dtype == "fp16" {
            return try MLMultiArray.half(input.shape) { values in
                for (index, value) in planes.enumerated() {
                    values[index] = Float16(value)
                }
            }
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
                "Core ML could not encode the picture: \(error.localizedDescription)")
        }
    }

    private static func array(
        _ outputs: MLFeatureProvider, _ name: VisionName
    ) throws -> MLMultiArray {
        guard let array = outputs.featureValue(for: name.rawValue)?.multiArrayValue else {
            throw EdgeVLMError("the package gave no \(name.rawValue)")
        }
        return array
    }
}
