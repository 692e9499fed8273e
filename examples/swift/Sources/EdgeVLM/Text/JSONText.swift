// JSON -> values whose strings are bytes. Swift compares strings by what they look like, so that a
// dictionary would drop one of two tokens that are the same letter written in two ways.

typealias Bytes = [UInt8]

indirect enum JSONText {
    case object([(name: Bytes, value: JSONText)])
    case array([JSONText])
    case string(Bytes)
    case number(Double)
    case bool(Bool)
    case null

    /// Raises EdgeVLMError for what is not JSON.
    init(_ bytes: Bytes) throws {
        self = try bytes.withUnsafeBufferPointer { buffer in
            var reader = JSONReader(buffer)
            return try reader.whole()
        }
    }

    subscript(name: String) -> JSONText {
        guard case .object(let entries) = self else { return .null }
        return entries.first { $0.name.elementsEqual(name.utf8) }?.value ?? .null
    }

    var entries: [(name: Bytes, value: JSONText)] {
        if case .object(let entries) = self { return entries }
        return []
    }

    var items: [JSONText] {
        if case .array(let items) = self { return items }
        return []
    }

    var bytes: Bytes? {
        if case .string(let bytes) = self { return bytes }
        return nil
    }

    var text: String? { bytes.map { String(decoding: $0, as: UTF8.self) } }

    var int: Int? {
        if case .number(let number) = self { return Int(exactly: number) }
        return nil
    }

    var bool: Bool {
        if case .bool(let value) = self { return value }
        return false
    }

    var isNull: Bool {
        if case .null = self { return true }
        return false
    }
}

private struct JSONReader {
    private let bytes: UnsafeBufferPointer<UInt8>
    private var place = 0

    init(_ bytes: UnsafeBufferPointer<UInt8>) { self.bytes = bytes }

    private var next: UInt8 { place < bytes.count ? bytes[place] : 0 }

    private var wrong: EdgeVLMError {
        EdgeVLMError("not JSON at byte \(place)", "copy or export the bundle again")
    }

    mutating func whole() throws -> JSONText {
        let result = try value(0)
        skipSpace()
        guard place == bytes.count else { throw wrong }
        return result
    }

    private mutating func skipSpace() {
        while [0x20, 0x09, 0x0A, 0x0D].contains(next) { place += 1 }
    }

    private mutating func take(_ wanted: UInt8) -> Bool {
        skipSpace()
        guard next == wanted, place < bytes.count else { return false }
        place += 1
        return true
    }

    private mutating func value(_ depth: Int) throws -> JSONText {
        guard depth < 64 else { throw wrong }
        skipSpace()
        switch next {
        case UInt8(ascii: "{"): return .object(try object(depth))
        case UInt8(ascii: "["): return .array(try array(depth))
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        default: return .number(try number())
        }
    }

    private mutating func word(_ text: StaticString, _ value: JSONText) throws -> JSONText {
        let length = text.utf8CodeUnitCount
        guard place + length <= bytes.count,
            text.withUTF8Buffer({ $0.elementsEqual(bytes[place..<place + length]) })
        else { throw wrong }
        place += length
        return value
    }

    private mutating func number() throws -> Double {
        let start = place
        while place < bytes.count, "+-.eE0123456789".utf8.contains(bytes[place]) { place += 1 }
        let text = String(decoding: bytes[start..<place], as: UTF8.self)
        guard let number = Double(text) else { throw wrong }
        return number
    }

    private mutating func object(_ depth: Int) throws -> [(name: Bytes, value: JSONText)] {
        place += 1
        var entries: [(name: Bytes, value: JSONText)] = []
        if take(UInt8(ascii: "}")) { return entries }
        repeat {
            skipSpace()
            guard next == UInt8(ascii: "\"") else { throw wrong }
            let name = try string()
            guard take(UInt8(ascii: ":")) else { throw wrong }
            entries.append((name, try value(depth + 1)))
        } while take(UInt8(ascii: ","))
        guard take(UInt8(ascii: "}")) else { throw wrong }
        return entries
    }

    private mutating func array(_ depth: Int) throws -> [JSONText] {
        place += 1
        var items: [JSONText] = []
        if take(UInt8(ascii: "]")) { return items }
        repeat { items.append(try value(depth + 1)) } while take(UInt8(ascii: ","))
        guard take(UInt8(ascii: "]")) else { throw wrong }
        return items
    }

    private mutating func string() throws -> Bytes {
        place += 1
        var out = Bytes()
        while place < bytes.count {
            let byte = bytes[place]
            place += 1
            if byte == UInt8(ascii: "\"") { return out }
            if byte == UInt8(ascii: "\\") {
                try escape(&out)
            } else {
                out.append(byte)
            }
        }
        throw wrong
    }

    private mutating func escape(_ out: inout Bytes) throws {
        let byte = next
        place += 1
        switch byte {
        case UInt8(ascii: "n"): out.append(0x0A)
        case UInt8(ascii: "t"): out.append(0x09)
        case UInt8(ascii: "r"): out.append(0x0D)
        case UInt8(ascii: "b"): out.append(0x08)
        case UInt8(ascii: "f"): out.append(0x0C)
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): out.append(byte)
        case UInt8(ascii: "u"): out += String(Character(try scalar())).utf8
        default: throw wrong
        }
    }

    /// The character of one \uXXXX, or of two that are a surrogate pair.
    private mutating func scalar() throws -> Unicode.Scalar {
        var code = try hex()
        if 0xD800..<0xDC00 ~= code, next == UInt8(ascii: "\\") {
            place += 2
            code = 0x10000 + (code - 0xD800) << 10 + (try hex()) &- 0xDC00
        }
        guard let scalar = Unicode.Scalar(code) else { throw wrong }
        return scalar
    }

    private mutating func hex() throws -> UInt32 {
        guard place + 4 <= bytes.count,
            let code = UInt32(String(decoding: bytes[place..<place + 4], as: UTF8.self), radix: 16)
        else { throw wrong }
        place += 4
        return code
    }
}
