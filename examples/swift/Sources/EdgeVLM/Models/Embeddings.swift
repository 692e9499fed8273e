// Token ids -> input embeddings, read from a memory-mapped safetensors file: an 8-byte length, a
// JSON header with each array's dtype, shape and place, then the arrays.

import Foundation

/// Input embeddings of some positions, one row of `width` after the other.
struct Rows: Sendable {
    let width: Int
    var values: [Float16]

    var count: Int { width == 0 ? 0 : values.count / width }
}

final class Embeddings {
    let width: Int
    let vocabulary: Int
    private let data: Data
    private let start: Int

    private struct Entry: Codable {
        let dtype: String
        let shape: [Int]
        let offsets: [Int]

        enum CodingKeys: String, CodingKey {
            case dtype, shape
            case offsets = "data_offsets"
        }
    }

    init(bundle: ModelBundle, described: Manifest.EmbeddingsFile) throws {
        if let bits = described.bits {
            throw EdgeVLMError(
                "the embeddings are packed in \(bits) bits, which EdgeVLM does not read",
                "export the bundle without --embedding-bits")
        }
        let url = bundle.folder.appending(path: described.file)
        guard let data = try? Data(contentsOf: url, options: .alwaysMapped), data.count > 8 else {
            throw EdgeVLMError("\(url.path): cannot be read", "copy or export the bundle again")
        }
        let length = data.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard length <= UInt64(data.count - 8) else {
            throw EdgeVLMError("\(described.file): is damaged", "copy or export the bundle again")
        }
        let header = data.subdata(in: 8..<8 + Int(length))
        guard
            let all = try? JSONSerialization.jsonObject(with: header) as? [String: Any],
            let found = all[described.name],
            let json = try? JSONSerialization.data(withJSONObject: found),
            let entry = try? JSONDecoder().decode(Entry.self, from: json),
            entry.dtype == "F16", entry.shape.count == 2, entry.shape == described.shape,
            entry.offsets.count == 2, entry.offsets[0] >= 0,
            entry.offsets[1] - entry.offsets[0] == 2 * entry.shape[0] * entry.shape[1],
            8 + Int(length) + entry.offsets[1] <= data.count
        else {
            throw EdgeVLMError(
                "\(described.file): not float16 embeddings as the manifest says", exportAgain)
        }
        self.data = data
        start = 8 + Int(length) + entry.offsets[0]
        vocabulary = entry.shape[0]
        width = entry.shape[1]
    }

    /// The embeddings of ids, in their order.
    func rows(_ ids: [Int]) throws -> Rows {
        var values = [Float16](repeating: 0, count: ids.count * width)
        let size = 2 * width
        try values.withUnsafeMutableBytes { out in
            for (index, id) in ids.enumerated() {
                guard id >= 0, id < vocabulary else {
                    throw EdgeVLMError(
                        "token \(id) is not one of the model's \(vocabulary)", exportAgain)
                }
                let place = out[index * size..<(index + 1) * size]
                let from = start + id * size
                data.copyBytes(
                    to: UnsafeMutableRawBufferPointer(rebasing: place), from: from..<from + size)
            }
        }
        return Rows(width: width, values: values)
    }
}
