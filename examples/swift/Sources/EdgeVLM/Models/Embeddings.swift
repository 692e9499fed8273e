// Token ids -> input embeddings, read from a memory-mapped safetensors file: an 8-byte length, a
// JSON header with each array's dtype, shape and place, then the arrays. A table is float16, or
// packed in 4 or 8 bits, whose groups have a scale and an offset each.

import Foundation

/// Input embeddings of some positions, one row of `width` after the other.
struct Rows: Sendable {
    let width: Int
    var values: [Float16]

    var count: Int { width == 0 ? 0 : values.count / width }
}

struct Embeddings: Sendable {
    let width: Int
    let vocabulary: Int
    private let file: MappedArrays
    private let table: Table

    private enum Table {
        /// float16 [V, width]
        case dense(start: Int)
        /// uint8 [V, width * bits / 8], lowest bits first; scales float16 [V, groups], offsets of
        /// the same shape, uint8 or float16.
        case packed(bits: Int, groups: Int, start: Int, scales: Int, offsets: Offsets)
    }

    private enum Offsets {
        case bytes(start: Int)
        case halves(start: Int)
    }

    /// Raises EdgeVLMError for a table that is not as the manifest describes it.
    init(folder: URL, described: Manifest.EmbeddingsFile) throws {
        let file = try MappedArrays(folder.appending(path: described.file))
        self.file = file
        guard described.shape.count == 2, described.shape.allSatisfy({ $0 > 0 }),
            described.dtype == "float16"
        else { throw file.unlike("float16 embeddings") }
        vocabulary = described.shape[0]
        width = described.shape[1]
        guard let bits = described.bits else {
            table = .dense(start: try file.start(described.name, "F16", described.shape))
            return
        }
        guard [4, 8].contains(bits), width * bits % 8 == 0 else {
            throw EdgeVLMError(
                "the embeddings are packed in \(bits) bits, which EdgeVLM does not read",
                "update EdgeVLM, or export with --embedding-bits 4 or 8")
        }
        let scale = "\(described.name).scale"
        guard let groups = file.shape(scale)?.last, groups > 0, width % groups == 0 else {
            throw file.unlike("scales of embeddings")
        }
        let each = [vocabulary, groups]
        let offset = "\(described.name).offset"
        let areBytes = file.dtype(offset) == "U8"
        let start = try file.start(offset, areBytes ? "U8" : "F16", each)
        table = .packed(
            bits: bits, groups: groups,
            start: try file.start(described.name, "U8", [vocabulary, width * bits / 8]),
            scales: try file.start(scale, "F16", each),
            offsets: areBytes ? .bytes(start: start) : .halves(start: start))
    }

    /// The embeddings of ids, in their order.
    func rows(_ ids: [Int]) throws -> Rows {
        var values = [Float16](repeating: 0, count: ids.count * width)
        try values.withUnsafeMutableBufferPointer { out in
            for (place, id) in ids.enumerated() {
                guard id >= 0, id < vocabulary else {
                    throw EdgeVLMError(
                        "token \(id) is not one of the model's \(vocabulary)", exportAgain)
                }
                read(
                    id,
                    into: UnsafeMutableBufferPointer(
                        rebasing: out[place * width..<(place + 1) * width]))
            }
        }
        return Rows(width: width, values: values)
    }

    private func read(_ id: Int, into row: UnsafeMutableBufferPointer<Float16>) {
        switch table {
        case .dense(let start):
            let size = 2 * width
            file.copy(start + id * size, size, to: UnsafeMutableRawBufferPointer(row))
        case .packed(let bits, let groups, let start, let scales, let offsets):
            unpack(id, bits, groups, start, scales, offsets, row)
        }
    }

    /// scale * (value - offset), in float32 as Python has it, rounded once.
    private func unpack(
        _ id: Int, _ bits: Int, _ groups: Int, _ start: Int, _ scales: Int, _ offsets: Offsets,
        _ row: UnsafeMutableBufferPointer<Float16>
    ) {
        let packed = width * bits / 8
        let bytes = file.bytes(start + id * packed, packed)
        let group = width / groups
        for number in 0..<groups {
            let place = id * groups + number
            let scale = Float(file.half(scales + 2 * place))
            let offset: Float
            switch offsets {
            case .bytes(let start): offset = Float(file.bytes(start + place, 1)[0])
            case .halves(let start): offset = Float(file.half(start + 2 * place))
            }
            for column in number * group..<(number + 1) * group {
                let value =
                    bits == 8 ? bytes[column] : bytes[column / 2] >> (column % 2 * 4) & 0x0F
                row[column] = Float16(scale * (Float(value) - offset))
            }
        }
    }
}

/// A safetensors file that stays on the disk, but for what is read of it.
struct MappedArrays: Sendable {
    private let name: String
    private let data: Data
    private let entries: [String: Entry]
    private let first: Int

    private struct Entry: Codable {
        let dtype: String
        let shape: [Int]
        let offsets: [Int]

        enum CodingKeys: String, CodingKey {
            case dtype, shape
            case offsets = "data_offsets"
        }
    }

    private static let sizes = ["F16": 2, "U8": 1, "F32": 4, "I32": 4]

    init(_ url: URL) throws {
        name = url.lastPathComponent
        guard let data = try? Data(contentsOf: url, options: .alwaysMapped), data.count > 8 else {
            throw EdgeVLMError("\(url.path): cannot be read", "copy or export the bundle again")
        }
        let length = data.prefix(8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard length <= UInt64(data.count - 8) else {
            throw EdgeVLMError("\(name): is damaged", "copy or export the bundle again")
        }
        let header = data.subdata(in: 8..<8 + Int(length))
        guard let all = try? JSONSerialization.jsonObject(with: header) as? [String: Any] else {
            throw EdgeVLMError("\(name): is damaged", "copy or export the bundle again")
        }
        entries = all.compactMapValues { entry in
            guard JSONSerialization.isValidJSONObject(entry),
                let json = try? JSONSerialization.data(withJSONObject: entry)
            else { return nil }
            return try? JSONDecoder().decode(Entry.self, from: json)
        }
        self.data = data
        first = 8 + Int(length)
    }

    func shape(_ array: String) -> [Int]? { entries[array]?.shape }

    func dtype(_ array: String) -> String? { entries[array]?.dtype }

    func unlike(_ what: String) -> EdgeVLMError {
        EdgeVLMError("\(name): not \(what) as the manifest says", exportAgain)
    }

    /// Where an array begins. Raises EdgeVLMError where it is of another type or shape.
    func start(_ array: String, _ dtype: String, _ shape: [Int]) throws -> Int {
        guard let entry = entries[array], entry.dtype == dtype, entry.shape == shape,
            let size = Self.sizes[dtype], entry.offsets.count == 2, entry.offsets[0] >= 0,
            entry.offsets[1] - entry.offsets[0] == shape.reduce(size, *),
            first + entry.offsets[1] <= data.count
        else { throw unlike("\(dtype) \(array) of \(shape)") }
        return first + entry.offsets[0]
    }

    func copy(_ start: Int, _ count: Int, to place: UnsafeMutableRawBufferPointer) {
        data.copyBytes(to: place, from: start..<start + count)
    }

    /// All values of an array of a type that is known here.
    func values(_ array: String) throws -> [Double] {
        guard let entry = entries[array] else { throw unlike(array) }
        let start = try start(array, entry.dtype, entry.shape)
        let size = Self.sizes[entry.dtype] ?? 1
        return (0..<entry.shape.reduce(1, *)).map { index in
            let place = start + index * size
            switch entry.dtype {
            case "U8": return Double(data[place])
            case "F16": return Double(half(place))
            case "F32": return Double(Float(bitPattern: word(place)))
            default: return Double(Int32(bitPattern: word(place)))
            }
        }
    }

    private func word(_ start: Int) -> UInt32 {
        data[start..<start + 4].reversed().reduce(0) { $0 << 8 | UInt32($1) }
    }

    func bytes(_ start: Int, _ count: Int) -> Bytes { Bytes(data[start..<start + count]) }

    func half(_ start: Int) -> Float16 {
        data.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: start, as: Float16.self) }
    }
}
