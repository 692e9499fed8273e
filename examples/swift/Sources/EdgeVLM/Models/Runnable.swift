// A manifest -> the parts that a session runs. All that the manifest alone can tell against it is
// told here, before anything is loaded, which may take minutes.

import Foundation

struct Runnable: Sendable {
    let vision: Manifest.EncoderPart
    /// Of the vision part and the connector, for the size of pictures that was chosen.
    let function: String
    /// What the vision part takes.
    let image: Manifest.Port
    let preprocessing: Manifest.Preprocessing
    /// nil where the vision part's end is fused with it.
    let connector: Manifest.EncoderPart?
    let decoder: Manifest.DecoderPart
    let geometry: DecoderGeometry

    /// A function of a package, which is loaded by itself.
    struct Model: Sendable {
        let package: String
        let function: String
        /// Whether the package has others.
        let isNamed: Bool
    }

    /// context, size: of those that the bundle has, nil for the first.
    ///
    /// Raises EdgeVLMError, with cause and remedy, for what a session cannot run.
    init(
        _ manifest: Manifest, context: Int? = nil, size: Manifest.PictureSize? = nil
    ) throws {
        guard MemoryLayout<Float16>.size == 2 else {
            throw EdgeVLMError(
                "Intel Macs have no float16, in which models run", "use a Mac with an Apple chip")
        }
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
        let (function, sized) = try Self.sized(preprocessing, manifest.sizes ?? [], size)
        guard let main = vision.functions[function],
            let image = main.inputs.first(where: { $0.name == VisionName.image.rawValue })
        else {
            throw EdgeVLMError("manifest.json: the vision part takes no picture", exportAgain)
        }
        let isFused = main.outputs.contains { $0.name == VisionName.visualTokens.rawValue }
        guard isFused || parts.connector != nil else {
            throw EdgeVLMError("the bundle has no connector", "export it with --part all")
        }
        self.vision = vision
        self.function = function
        self.image = image
        self.preprocessing = sized
        connector = isFused ? nil : parts.connector
        self.decoder = decoder
        geometry = try DecoderGeometry(decoder, context: context)
        try preprocessing.check()
        try Self.check(decoder, geometry)
        for (_, units) in models { _ = try ComputeUnits(manifest: units) }
    }

    /// The function for a size of pictures, and how a picture becomes what it takes.
    private static func sized(
        _ first: Manifest.Preprocessing, _ known: [Manifest.PictureSize],
        _ wanted: Manifest.PictureSize?
    ) throws -> (String, Manifest.Preprocessing) {
        guard let wanted else { return (FunctionName.main.rawValue, first) }
        let size = known.first { ($0.width, $0.height) == (wanted.width, wanted.height) }
        guard let size else {
            let sizes = known.map { "\($0.width)x\($0.height)" }.joined(separator: ", ")
            throw EdgeVLMError(
                "the bundle takes no pictures of \(wanted.width)x\(wanted.height)",
                "choose one of its sizes: \(sizes)")
        }
        return (size.function, first.sized(size.width, size.height))
    }

    private static func check(
        _ decoder: Manifest.DecoderPart, _ geometry: DecoderGeometry
    ) throws {
        let dtype = decoder.geometry.dtype
        guard dtype == "float16" else {
            throw EdgeVLMError("the decoder is in \(dtype)", "export it with --precision fp16")
        }
        let chunk = decoder.geometry.chunk
        guard ["stateful", "readonly"].contains(geometry.form),
            geometry.headDim == 2 * geometry.periods.count, chunk > 1,
            geometry.chunks.values.min() == chunk,
            geometry.chunks.values.allSatisfy({ $0 <= geometry.context })
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
            (
                Model(
                    package: $0.package, function: function, isNamed: $0.functions.count > 1),
                $0.computeUnits
            )
        }
        let sizes = geometry.functions.sorted { $0.value > $1.value }
        return encoders + sizes.map {
            (
                Model(package: decoder.package, function: $0.key, isNamed: true),
                decoder.computeUnits
            )
        }
    }
}

let otherFamily = "export a FastVLM, MobileVLM, LLaVA or EVE model"

/// The decoder's sizes, for one of its contexts.
struct DecoderGeometry: Sendable {
    let form: String
    let layers, kvHeads, headDim: Int
    let periods: [Double]
    let context: Int
    /// Positions of each function that takes several.
    let chunks: [String: Int]
    /// The function that takes one.
    let decode: String

    /// Raises EdgeVLMError for a context that the bundle has not.
    init(_ part: Manifest.DecoderPart, context wanted: Int?) throws {
        let described = part.geometry
        form = described.form
        layers = described.layers
        kvHeads = described.kvHeads
        headDim = described.headDim
        periods = described.periods
        guard let wanted, wanted != described.context else {
            context = described.context
            chunks = described.chunks
            decode = FunctionName.decode.rawValue
            return
        }
        guard let other = part.contexts?.first(where: { $0.context == wanted }) else {
            let known = part.contexts?.map { String($0.context) } ?? [String(described.context)]
            throw EdgeVLMError(
                "the bundle has no context of \(wanted)",
                "choose one of its own: \(known.joined(separator: ", "))")
        }
        context = other.context
        chunks = other.chunks
        decode = other.decode
    }

    /// Every function, and how many positions it takes.
    var functions: [String: Int] { chunks.merging([decode: 1]) { size, _ in size } }

    /// The function of the next call over a prompt: of those within `room`, whose padding does not
    /// reach beyond the cache, the largest of which more than half is used.
    ///
    /// remaining: positions of the prompt that are left; room: of the cache.
    func function(remaining: Int, room: Int) -> (name: String, size: Int) {
        let fitting = chunks.filter { $0.value <= room }.sorted { $0.value > $1.value }
        let used = fitting.first { remaining > $0.value / 2 } ?? fitting.last
        return used.map { ($0.key, $0.value) } ?? (decode, 1)
    }
}
