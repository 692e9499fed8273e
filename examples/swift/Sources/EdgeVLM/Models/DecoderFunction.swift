// A function of the decoder's package with the arrays that go in and come out of it. They are made
// once; a call writes the same ones anew.

import CoreML
import Foundation

final class DecoderFunction {
    let model: MLModel
    /// What `LanguageDecoder` writes; caches and positions are not among them.
    let inputs: [DecoderName: MLMultiArray]
    private let options = MLPredictionOptions()

    init(model: MLModel, _ described: Manifest.Function) throws {
        self.model = model
        inputs = try described.inputs.reduce(into: [:]) { all, port in
            guard port.dtype == "fp16", let name = DecoderName(rawValue: port.name) else { return }
            all[name] = try MLMultiArray.half(port.shape)
        }
        // Core ML may leave a backing aside, so that results are read from what it gives back.
        options.outputBackings = try described.outputs.reduce(into: [:]) { all, port in
            if port.dtype == "fp16" { all[port.name] = try MLMultiArray.half(port.shape) }
        }
    }

    func predict(_ inputs: MLFeatureProvider, _ state: MLState?) throws -> MLFeatureProvider {
        do {
            if let state {
                return try model.prediction(from: inputs, using: state, options: options)
            }
            return try model.prediction(from: inputs, options: options)
        } catch {
            throw EdgeVLMError(
                "Core ML could not run the decoder: \(error.localizedDescription)",
                "close other apps, or export for other compute units with --compute")
        }
    }
}
