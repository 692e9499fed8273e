// Keys and values of the ids that prompts begin with, as the bundle has them -> the start of the
// decoder's own cache, so that a prompt which begins so is run from behind them.

import CoreML
import Foundation

struct PromptCache: Sendable {
    let ids: [Int]
    private let file: MappedArrays
    /// [layers, heads, positions, channels] of a stateful decoder, else [layers, heads, channels,
    /// positions].
    private let shape: [Int]
    private let isStateful: Bool

    /// Raises EdgeVLMError for arrays that are not as the manifest describes them.
    init(folder: URL, described: Manifest.PromptCache, geometry: Manifest.Geometry) throws {
        ids = described.ids
        file = try MappedArrays(folder.appending(path: described.file))
        isStateful = geometry.form == "stateful"
        let last = isStateful ? [ids.count, geometry.headDim] : [geometry.headDim, ids.count]
        shape = [geometry.layers, geometry.kvHeads] + last
        for name in [DecoderPrefix.keys, .values] {
            _ = try file.start(name.rawValue, "F16", shape)
        }
    }

    /// How many of a prompt's first ids are these.
    func shared(with prompt: [Int]) -> Int {
        zip(ids, prompt).prefix { $0 == $1 }.count
    }

    /// Write the first `count` positions of the array of this name at the start of `cache`.
    func write(_ name: String, _ count: Int, to cache: MLMultiArray) throws {
        let start = try file.start(name, "F16", shape)
        let sizes = cache.shape.map(\.intValue)
        guard cache.dataType == .float16, sizes.count == 4, sizes[0] == shape[0],
            sizes[1] == shape[1], sizes[isStateful ? 3 : 2] == shape[isStateful ? 3 : 2],
            sizes[isStateful ? 2 : 3] >= count, count <= ids.count
        else { throw EdgeVLMError("the decoder's cache is not as its manifest says", exportAgain) }
        let width = isStateful ? shape[3] : count
        cache.withUnsafeMutableBytes { bytes, steps in
            let target = bytes.bindMemory(to: Float16.self)
            for number in 0..<shape[0] * shape[1] * shape[2] {
                let row = number % shape[2]
                if isStateful && row >= count { continue }
                let head = number / shape[2] % shape[1]
                let layer = number / (shape[2] * shape[1])
                let place = layer * steps[0] + head * steps[1] + row * steps[2]
                let source = start + 2 * number * shape[3]
                for index in 0..<width {
                    target[place + index * steps[3]] = file.half(source + 2 * index)
                }
            }
        }
    }
}
