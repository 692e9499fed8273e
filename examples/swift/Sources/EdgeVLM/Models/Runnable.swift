// A manifest -> the parts that a session runs. All that the manifest alone can tell against it is
// told here, before anything is loaded, which may take minutes.

import Foundation

struct Runnable: Sendable {
    let vision: Manifest.EncoderPart
    /// What the vision part takes.
    let image: Manifest.Port
    let preprocessing: Manifest.Preprocessing
    /// nil where the vision part's end is fused with it.
    let connector: Manifest.EncoderPart?
    let decoder: Manifest.DecoderPart

    /// A function of a package, which is loaded by itself.
    struct Model: Hashable, Sendable {
        let package: String
        let function: String
    }

    /// Raises EdgeVLMError, with cause and remedy, for what a session cannot run.
    init(_ manifest: Manifest) throws {
        let parts = manifest.parts
        guard parts.vision?.tiles != true else {
            throw EdgeVLMError(
                "this model takes pictures in tiles, which EdgeVLM does not cut", otherFamily)
        }
        guard let vision = parts.vision, let preprocessing = manifest.preprocessing else {
            throw EdgeVLMError(
                "the bundle has no vision part, or several",
                "export a model of one vision tower with --part all")
        }
        guard let decoder = parts.decoder else {
            throw EdgeVLMError("the bundle has no decoder", "export it with --part all")
        }
        guard let main = vision.functions[FunctionName.main.rawValue],
            let image = main.inputs.first(where: { $0.name == VisionName.image.rawValue })
        else {
            throw EdgeVLMError("manifest.json: the vision part takes no picture", exportAgain)
        }
        let isFused = main.outputs.contains { $0.name == VisionName.visualTokens.rawValue }
        guard isFused || parts.connector != nil else {
            throw EdgeVLMError("the bundle has no connector", "export it with --part all")
        }
        self.vision = vision
        self.image = image
        self.preprocessing = preprocessing
        connector = isFused ? nil : parts.connector
        self.decoder = decoder
        try preprocessing.check()
        try Self.check(decoder)
        for (_, units) in models { _ = try ComputeUnits(manifest: units) }
    }

    private static func check(_ decoder: Manifest.DecoderPart) throws {
        let geometry = decoder.geometry
        guard geometry.dtype == "float16" else {
            throw EdgeVLMError(
                "the decoder is in \(geometry.dtype)", "export it with --precision fp16")
        }
        let sizes = geometry.chunks.values
        guard ["stateful", "readonly"].contains(geometry.form),
            geometry.headDim == 2 * geometry.periods.count, geometry.chunk > 1,
            geometry.chunks[FunctionName.prefill.rawValue] == geometry.chunk,
            sizes.min() == geometry.chunk, sizes.allSatisfy({ $0 <= geometry.context })
        else {
            throw EdgeVLMError(
                "manifest.json: the decoder's geometry is not known", "update EdgeVLM")
        }
        for name in geometry.functions.keys.sorted() where decoder.functions[name] == nil {
            throw EdgeVLMError("manifest.json: the decoder has no function \(name)", exportAgain)
        }
    }

    /// What is loaded, in order, and the compute units that the manifest asks for.
    var models: [(model: Model, units: String)] {
        let encoders = [vision, connector].compactMap { $0 }.map {
            (Model(package: $0.package, function: FunctionName.main.rawValue), $0.computeUnits)
        }
        let sizes = decoder.geometry.functions.sorted { $0.value > $1.value }
        return encoders + sizes.map {
            (Model(package: decoder.package, function: $0.key), decoder.computeUnits)
        }
    }
}

let otherFamily = "export a FastVLM, MobileVLM, LLaVA or EVE model"

extension Manifest.Geometry {
    /// Every function of the decoder, and how many positions it takes.
    var functions: [String: Int] {
        chunks.merging([FunctionName.decode.rawValue: 1]) { size, _ in size }
    }

    /// The function of the next call over a prompt: of those within `room`, whose padding does not
    /// reach beyond the cache, the largest of which more than half is used.
    ///
    /// remaining: positions of the prompt that are left; room: of the cache.
    func function(remaining: Int, room: Int) -> (name: String, size: Int) {
        let fitting = chunks.filter { $0.value <= room }.sorted { $0.value > $1.value }
        let used = fitting.first { remaining > $0.value / 2 } ?? fitting.last
        return used.map { ($0.key, $0.value) } ?? (FunctionName.decode.rawValue, 1)
    }
}
