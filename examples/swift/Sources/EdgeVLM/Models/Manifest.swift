// manifest.json of an exported bundle -> values with its names.
// Every key of the bundles that Session opens is here, and a test compares the two with what was
// just exported. Of docs/bundle.schema.json's keys it lacks those that only others have: parts
// `vision_0`, ... with their `tower` and `preprocessing`, `arrays`, `coreai`.

import Foundation

public struct Manifest: Codable, Sendable {
    public let format: Int
    public let model: Model
    /// The model's, as its files say.
    public let licence: String
    /// Of the part that needs the latest.
    public let minimumOS: MinimumOS
    public let parts: Parts
    public let preprocessing: Preprocessing?
    /// The sizes of pictures, that of `preprocessing` first; nil in bundles from before.
    public let sizes: [PictureSize]?
    public let tokens: Tokens
    public let prompt: Prompt?
    public let context: Int?
    /// What the files take of an iPhone's memory, all of them loaded.
    public let memory: Memory
    /// Path in the bundle -> sha256.
    public let files: [String: String]

    /// What `format` must be.
    public static let known = 2

    enum CodingKeys: String, CodingKey {
        case format, model, licence, parts, preprocessing, sizes, tokens, prompt, context, memory
        case files
        case minimumOS = "minimum_os"
    }
}

extension Manifest {
    public struct Model: Codable, Sendable {
        public let name: String
        public let modelType: String?
        public let exporter: String
        public let coremltools: String

        enum CodingKeys: String, CodingKey {
            case name, exporter, coremltools
            case modelType = "model_type"
        }
    }

    /// `connector` stands by itself only where it was not fused behind the vision tower.
    public struct Parts: Codable, Sendable {
        public let vision: EncoderPart?
        public let connector: EncoderPart?
        public let decoder: DecoderPart?
    }

    /// The vision tower or the connector.
    public struct EncoderPart: Codable, Sendable {
        public let package: String
        public let minimumOS: MinimumOS
        public let functions: [String: Function]
        public let precision: String
        public let computeUnits: String
        /// What to try in turn where loading or the trial fails.
        public let fallbackUnits: [String]
        public let memory: PartMemory
        public let trial: Trial?
        public let parity: [Parity]?
        public let largestActivation: Double?
        public let lint: [String: Int]?
        public let rangeRepair: RangeRepair
        /// The picture must be cut into tiles first, which this example does not do.
        public let tiles: Bool?

        enum CodingKeys: String, CodingKey {
            case package, functions, precision, memory, trial, parity, lint, tiles
            case fallbackUnits = "fallback_units"
            case minimumOS = "minimum_os"
            case computeUnits = "compute_units"
            case largestActivation = "largest_activation"
            case rangeRepair = "range_repair"
        }
    }

    public struct DecoderPart: Codable, Sendable {
        public let package: String
        public let minimumOS: MinimumOS
        public let functions: [String: Function]
        public let precision: String
        public let computeUnits: String
        /// What to try in turn where loading or the trial fails.
        public let fallbackUnits: [String]
        public let memory: PartMemory
        public let trial: Trial?
        public let parity: [Parity]?
        public let largestActivation: Double?
        public let lint: [String: Int]?
        public let geometry: Geometry
        /// The caches that there are functions for, that of `geometry` first; nil in bundles from
        /// before.
        public let contexts: [Context]?
        public let embeddings: EmbeddingsFile
        /// nil where the bundle was not verified, or prompts begin with their picture.
        public let promptCache: PromptCache?
        public let weights: [String]
        public let matricesWithFloatOffsets: Int

        enum CodingKeys: String, CodingKey {
            case package, functions, precision, memory, trial, parity, lint, geometry, contexts
            case embeddings, weights
            case promptCache = "prompt_cache"
            case fallbackUnits = "fallback_units"
            case minimumOS = "minimum_os"
            case computeUnits = "compute_units"
            case largestActivation = "largest_activation"
            case matricesWithFloatOffsets = "matrices_with_float_offsets"
        }
    }

    /// Bytes of the package, and of what the app keeps beside it.
    public struct PartMemory: Codable, Sendable {
        public let package: Int
        public let cache: Int?
        public let embeddings: Int?
    }

    /// file: what went in and what came out, by name; limit: how far a device may be from it.
    public struct Trial: Codable, Sendable {
        public let file: String
        public let limit: Double
    }

    public struct MinimumOS: Codable, Sendable {
        public let ios: String
        public let macos: String
    }

    /// What goes in and out of one function of a package.
    public struct Function: Codable, Sendable {
        public let inputs: [Port]
        public let outputs: [Port]
        public let states: [Port]
    }

    /// kind: "image", "tensor" or "state". dtype: "fp16", "fp32" or "int32".
    public struct Port: Codable, Sendable {
        public let name: String
        public let kind: String
        public let dtype: String
        public let shape: [Int]
    }

    /// How far the package was from the MLX model when it was exported.
    public struct Parity: Codable, Sendable {
        public let inputs: String
        public let error: Double
        public let limit: Double
    }

    public struct RangeRepair: Codable, Sendable {
        public let powersOfTwo: [String: Int]
        public let float32: [String]

        enum CodingKeys: String, CodingKey {
            case powersOfTwo = "powers_of_two"
            case float32
        }
    }

    /// form: "stateful" or "readonly". chunks: positions of each function that takes several;
    /// chunk: of the smallest, `prefill`. Position / period is the angle of a rotary pair.
    public struct Geometry: Codable, Sendable {
        public let form: String
        public let layers: Int
        public let kvHeads: Int
        public let headDim: Int
        public let context: Int
        public let chunk: Int
        public let chunks: [String: Int]
        public let periods: [Double]
        public let dtype: String

        enum CodingKeys: String, CodingKey {
            case form, layers, context, chunk, chunks, periods, dtype
            case kvHeads = "kv_heads"
            case headDim = "head_dim"
        }
    }

    /// A cache of so many positions: its functions that take several, the one that takes one, and
    /// its bytes. States of one context go into no other.
    public struct Context: Codable, Sendable {
        public let context: Int
        public let chunks: [String: Int]
        public let decode: String
        public let cache: Int
    }

    /// A file of the `keys` and `values` of the ids that prompts begin with, as they lie in the
    /// decoder's states or inputs of these names, with as many positions as there are ids.
    public struct PromptCache: Codable, Sendable {
        public let file: String
        public let ids: [Int]
    }

    /// function: of the vision part and the connector. tokens: visual tokens of a picture; nil
    /// where no package of the bundle gives them.
    public struct PictureSize: Codable, Sendable {
        public let function: String
        public let height: Int
        public let width: Int
        public let tokens: Int?
    }

    /// bits: nil where the tensor is dense; else it is packed, and `<name>.scale` and
    /// `<name>.offset` are beside it.
    public struct EmbeddingsFile: Codable, Sendable {
        public let bits: Int?
        public let file: String
        public let name: String
        public let dtype: String
        public let shape: [Int]
    }

    /// strategy: "pad", "center_crop" or "stretch". Scale, mean and std are in the package already.
    public struct Preprocessing: Codable, Sendable {
        public let strategy: String
        public let width: Int
        public let height: Int
        public let fill: [Int]
        public let resample: String
        public let color: String
        public let range: [Int]
        public let folded: Folded
        /// A file of pictures with what must come of them; see `PreprocessingCheck`.
        public let vectors: String
    }

    public struct Folded: Codable, Sendable {
        public let scale: Double
        public let mean: [Double]
        public let std: [Double]
    }

    /// limits: where the phones' figures are from.
    public struct Memory: Codable, Sendable {
        public let files: Int
        public let entitlement: String
        public let limits: String
        public let phones: [Phone]
    }

    /// A phone of so much memory: how much an app may take of it without and with the entitlement,
    /// and the share of that which the files are.
    public struct Phone: Codable, Sendable {
        public let memoryGB: Double
        public let limitGB: Double
        public let share: Double
        public let entitledLimitGB: Double
        public let entitledShare: Double

        enum CodingKeys: String, CodingKey {
            case share
            case memoryGB = "memory_gb"
            case limitGB = "limit_gb"
            case entitledLimitGB = "entitled_limit_gb"
            case entitledShare = "entitled_share"
        }
    }

    public struct Tokens: Codable, Sendable {
        public let image: Int?
        public let bos: Int?
        public let eos: [Int]
    }

    /// beforeImage, visual tokens, afterImage, then beforeQuestion + question + afterQuestion as
    /// one text, tokenised with its special tokens.
    public struct Prompt: Codable, Sendable {
        public let beforeImage: [Int]
        public let afterImage: [Int]
        public let beforeQuestion: String
        public let afterQuestion: String
        public let specialTokens: [String]
        /// nil where turns are not text one after another.
        public let chat: Chat?

        enum CodingKeys: String, CodingKey {
            case chat
            case beforeImage = "before_image"
            case afterImage = "after_image"
            case beforeQuestion = "before_question"
            case afterQuestion = "after_question"
            case specialTokens = "special_tokens"
        }
    }

    /// bos, then `start`, or the two of `system` around an app's own instructions; then for each
    /// turn: each picture's tokens and `afterPicture`, the question, `afterQuestion`, the answer's
    /// tokens, and `afterAnswer` before the next turn. Each stretch of text is tokenised by itself.
    public struct Chat: Codable, Sendable {
        public let bos: [Int]
        public let start: String
        public let system: [String]?
        public let afterPicture: String
        public let afterQuestion: String
        public let afterAnswer: String

        enum CodingKeys: String, CodingKey {
            case bos, start, system
            case afterPicture = "after_picture"
            case afterQuestion = "after_question"
            case afterAnswer = "after_answer"
        }
    }
}

/// Functions of the packages.
enum FunctionName: String {
    case main, prefill, decode
}

/// Inputs and outputs of the vision part and the connector.
enum VisionName: String {
    case image
    case imageFeatures = "image_features"
    case visualTokens = "visual_tokens"
}

/// Inputs of the decoder, and the token that it says leads where its form is "stateful".
enum DecoderName: String {
    case embeddings, mask, cos, sin, position, pick, token
}

/// What names of the decoder begin with: the caches, their new values, parts of the logits.
enum DecoderPrefix: String {
    case keys
    case values
    case new = "new_"
    case logits
}
