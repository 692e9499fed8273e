// The trial files of a bundle -> whether its parts compute here what they did when they were
// exported. Where the Neural Engine fails it does so silently: by wrong numbers.

import CoreML
import Foundation

/// What went into a part and what came out of it.
struct TrialFile {
    private let part: String
    private let arrays: MappedArrays
    private let limit: Double

    /// nil where the part was exported without a trial.
    init?(_ trial: Manifest.Trial?, of part: String, in folder: URL) throws {
        guard let trial else { return nil }
        self.part = part
        arrays = try MappedArrays(folder.appending(path: trial.file))
        limit = trial.limit
    }

    /// A picture, uint8 [H, W, 3].
    func raster() throws -> Raster {
        let name = VisionName.image.rawValue
        guard let shape = arrays.shape(name), shape.count == 3, shape[2] == 3 else {
            throw arrays.unlike("a picture")
        }
        let values = try arrays.values(name).map { UInt8($0) }
        return Raster(width: shape[1], height: shape[0], rgb: values)
    }

    /// An input, float16 of any shape.
    func array(_ name: VisionName) throws -> MLMultiArray {
        let values = try arrays.values(name.rawValue).map { Float16($0) }
        return try MLMultiArray.half(arrays.shape(name.rawValue) ?? [], values: values)
    }

    /// Token ids, and the token that leads behind them.
    func tokens() throws -> (ids: [Int], token: Int) {
        let token = try arrays.values("token")
        guard token.count == 1 else { throw arrays.unlike("a token") }
        return (try arrays.values("ids").map { Int($0) }, Int(token[0]))
    }

    /// Raises EdgeVLMError where an output is not what it was.
    func check(_ output: MLMultiArray, _ name: VisionName) throws {
        let here = try output.halves(name.rawValue).map { Double($0) }
        let there = try arrays.values(name.rawValue)
        guard here.count == there.count else { throw arrays.unlike("the \(name.rawValue)") }
        let away = zip(here, there).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
        let whole = there.reduce(0) { $0 + $1 * $1 }
        try check((away / max(whole, .leastNormalMagnitude)).squareRoot())
    }

    /// Raises EdgeVLMError where another token leads by more than the limit, as a share of all that
    /// the logits span.
    func check(_ next: NextToken, leads token: Int) throws {
        let logits = try next.logits().map { Double($0) }
        guard let top = logits.max(), let bottom = logits.min(), logits.indices.contains(token)
        else { throw arrays.unlike("a token") }
        try check((top - logits[token]) / max(top - bottom, .leastNormalMagnitude))
    }

    /// What is no number is too far as well.
    private func check(_ error: Double) throws {
        guard error <= limit else {
            throw EdgeVLMError(
                "\(part): its trial is off by \(Float(error)), which may be \(limit) at most",
                "export for other compute units with --compute, or with --precision fp32")
        }
    }
}
