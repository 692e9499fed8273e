// Input embeddings -> logits of the last position, chunk after chunk of a prompt, then token after
// token. Keys and values are in Core ML's state ("stateful"), or in arrays that go in with each
// call and are written here afterwards ("readonly"). Masks, rotary turns, positions are made here.

import CoreML
import Foundation

final class LanguageDecoder {
    private(set) var offset = 0
    let geometry: Manifest.Geometry
    let embeddings: Embeddings

    private let models: [FunctionName: MLModel]
    private let cacheNames: [String]
    private let logitsNames: [String]
    private var caches: [String: MLMultiArray] = [:]
    private var state: MLState?

    /// Added to the scores of what a position does not see; finite, as devices want it.
    private static let hidden: Float16 = -1e4

    init(bundle: ModelBundle, packages: Packages) throws {
        guard let entry = bundle.manifest.parts.decoder else {
            throw EdgeVLMError("the bundle has no decoder", "export it with --part all")
        }
        let geometry = entry.geometry
        guard geometry.dtype == "float16" else {
            throw EdgeVLMError(
                "the decoder is in \(geometry.dtype)", "export it with --precision fp16")
        }
        guard ["stateful", "readonly"].contains(geometry.form),
            geometry.headDim == 2 * geometry.periods.count, geometry.chunk > 1
        else {
            throw EdgeVLMError(
                "manifest.json: the decoder's geometry is not known", "update EdgeVLM")
        }
        guard let decode = entry.functions[FunctionName.decode.rawValue] else {
            throw EdgeVLMError("manifest.json: the decoder has no function decode", exportAgain)
        }
        self.geometry = geometry
        embeddings = try Embeddings(bundle: bundle, described: entry.embeddings)
        let prefixes = [DecoderPrefix.keys.rawValue, DecoderPrefix.values.rawValue]
        cacheNames = decode.inputs.map(\.name).filter { name in
            prefixes.contains { name.hasPrefix($0) }
        }
        logitsNames = decode.outputs.map(\.name)
            .filter { $0.hasPrefix(DecoderPrefix.logits.rawValue) }
            .sorted { LanguageDecoder.number($0) < LanguageDecoder.number($1) }
        models = [
            .prefill: try packages[entry.package, .prefill],
            .decode: try packages[entry.package, .decode],
        ]
        try clear()
    }

    /// The part of "logits_2" behind its underscore, 0 without one.
    private static func number(_ name: String) -> Int {
        Int(name.split(separator: "_").last ?? "") ?? 0
    }

    private var stateful: Bool { geometry.form == "stateful" }

    private func clear() throws {
        if stateful {
            state = try model(.prefill).makeState()
            return
        }
        let shape = [geometry.layers, geometry.kvHeads, geometry.headDim, geometry.context]
        for name in cacheNames {
            caches[name] = try MLMultiArray.half(shape)
        }
    }

    /// Go on behind the first `offset` positions; no mask shows what is behind them.
    func rewind(to offset: Int) {
        self.offset = min(offset, self.offset)
    }

    /// Bytes of keys and values.
    var cacheBytes: Int {
        2 * 2 * geometry.layers * geometry.kvHeads * geometry.headDim * geometry.context
    }

    private func model(_ function: FunctionName) throws -> MLModel {
        guard let model = models[function] else {
            throw EdgeVLMError("the decoder has no function \(function.rawValue)", exportAgain)
        }
        return model
    }

    /// Run a prompt behind what is cached; the logits of its last position.
    func prefill(_ prompt: Rows) throws -> [Float16] {
        guard prompt.count > 0, prompt.width == embeddings.width else {
            throw EdgeVLMError(
                "the prompt's embeddings are \(prompt.width) wide, not \(embeddings.width)",
                exportAgain)
        }
        guard offset + prompt.count <= geometry.context else {
            throw EdgeVLMError(
                "the conversation takes \(offset + prompt.count) positions of the context's "
                    + "\(geometry.context)",
                "begin a new one, or export with a larger --context")
        }
        var logits: [Float16] = []
        var first = 0
        while first < prompt.count {
            try Task.checkCancellation()
            // Padding must not reach beyond the cache's end.
            let whole = offset + geometry.chunk <= geometry.context
            let count = min(whole ? geometry.chunk : 1, prompt.count - first)
            let part = prompt.values[first * prompt.width..<(first + count) * prompt.width]
            logits = try run(whole ? .prefill : .decode, Array(part), count)
            first += count
        }
        return logits
    }

    /// The logits behind one more token.
    func step(_ token: Int) throws -> [Float16] {
        guard hasRoom else {
            throw EdgeVLMError(
                "the context of \(geometry.context) is full",
                "begin a new conversation, or export with a larger --context")
        }
        return try run(.decode, try embeddings.rows([token]).values, 1)
    }

    /// Whether one more token fits.
    var hasRoom: Bool { offset < geometry.context }

    private func run(
        _ function: FunctionName, _ values: [Float16], _ count: Int
    ) throws -> [Float16] {
        let size = function == .prefill ? geometry.chunk : 1
        var inputs: [DecoderName: MLMultiArray] = [
            .embeddings: try embedded(values, count, size),
            .mask: try mask(size),
            .cos: try turns(size) { Foundation.cos($0) },
            .sin: try turns(size) { Foundation.sin($0) },
        ]
        if function == .prefill {
            let shape = stateful ? [1, 1, size] : [1, size, 1]
            inputs[.pick] = try MLMultiArray.half(shape) { $0[count - 1] = 1 }
        }
        if stateful {
            inputs[.position] = try MLMultiArray.single(offset)
        }
        var named = caches.mapValues { MLFeatureValue(multiArray: $0) }
        for (name, array) in inputs {
            named[name.rawValue] = MLFeatureValue(multiArray: array)
        }
        let outputs = try predict(function, MLDictionaryFeatureProvider(dictionary: named))
        for (name, cache) in caches {
            let new = try Self.array(outputs, DecoderPrefix.new.rawValue + name)
            try cache.write(new, count: count, at: offset)
        }
        offset += count
        return try logitsNames.flatMap { try Self.array(outputs, $0).halves($0) }
    }

    private func predict(
        _ function: FunctionName, _ inputs: MLFeatureProvider
    ) throws -> MLFeatureProvider {
        let model = try model(function)
        do {
            if let state {
                return try model.prediction(from: inputs, using: state)
            }
            return try model.prediction(from: inputs)
        } catch {
            throw EdgeVLMError(
                "Core ML could not run the decoder: \(error.localizedDescription)",
                "close other apps, or export for other compute units with --compute")
        }
    }

    private static func array(
        _ outputs: MLFeatureProvider, _ name: String
    ) throws -> MLMultiArray {
        guard let array = outputs.featureValue(for: name)?.multiArrayValue else {
            throw EdgeVLMError("the decoder gave no \(name)", exportAgain)
        }
        return array
    }

    /// Rows [1, size, D], or channels first [1, D, 1, size]; zeros behind `count` positions.
    private func embedded(_ values: [Float16], _ count: Int, _ size: Int) throws -> MLMultiArray {
        let width = embeddings.width
        if stateful {
            return try MLMultiArray.half([1, size, width]) { out in
                for (index, value) in values.enumerated() {
                    out[index] = value
                }
            }
        }
        return try MLMultiArray.half([1, width, 1, size]) { out in
            for position in 0..<count {
                for channel in 0..<width {
                    out[channel * size + position] = values[position * width + channel]
                }
            }
        }
    }

    /// 0 where a position sees a key of the cache, else `hidden`.
    ///
    /// Stateful [1, 1, size, context], the new positions in place; read-only
    /// [1, 1, 1, context], the cache before them.
    private func mask(_ size: Int) throws -> MLMultiArray {
        let context = geometry.context
        let rows = stateful ? size : 1
        return try MLMultiArray.half([1, 1, rows, context]) { out in
            for row in 0..<rows {
                let seen = stateful ? offset + row + 1 : offset
                for key in 0..<context {
                    out[row * context + key] = key < seen ? 0 : Self.hidden
                }
            }
        }
    }

    /// Cosines or sines [1, 1, head_dim, size] of the next positions; both halves are alike.
    private func turns(_ size: Int, _ turn: (Double) -> Double) throws -> MLMultiArray {
        let pairs = geometry.periods.count
        return try MLMultiArray.half([1, 1, geometry.headDim, size]) { out in
            for row in 0..<geometry.headDim {
                for position in 0..<size {
                    let angle = Double(offset + position) / geometry.periods[row % pairs]
                    out[row * size + position] = Float16(turn(angle))
                }
            }
        }
    }
}
