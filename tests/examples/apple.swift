// Stand-ins for what the example takes from Apple's modules, so that it runs where Swift does: Core
// ML's calls go through two pipes to the test, which has the interpreter and the tokenizer. Arrays
// that come back have gaps between their rows, as Core ML's may. Pictures have the model's size.

import Foundation

// The pipes: a JSON object a line; arrays are files.
final class Link {
    static let shared = Link()
    let folder = CommandLine.arguments[1]
    lazy var out = FileHandle(forWritingAtPath: folder + "/asked")!
    lazy var back = FileHandle(forReadingAtPath: folder + "/answered")!
    var files = 0

    func ask(_ object: [String: Any]) -> [String: Any] {
        out.write(try! JSONSerialization.data(withJSONObject: object) + [10])
        var line = Data()
        while true {
            let byte = back.readData(ofLength: 1)
            if byte.isEmpty { fatalError("the test has gone") }
            if byte.first == 10 { break }
            line.append(byte)
        }
        return try! JSONSerialization.jsonObject(with: line) as! [String: Any]
    }

    func write(_ data: Data) -> String {
        files += 1
        let path = "\(folder)/in\(files % 500)"
        try! data.write(to: URL(fileURLWithPath: path))
        return path
    }
}

// CoreGraphics, CoreVideo, ImageIO
typealias CFString = String
typealias CFURL = URL
typealias CFDictionary = [String: Any]

final class CGColorSpace {
    static let sRGB = "sRGB"
    init?(name: CFString) {}
}

final class CGImage: @unchecked Sendable {
    let width: Int
    let height: Int
    let rgb: [UInt8]

    init(side: Int, rgb: [UInt8]) {
        width = side
        height = side
        self.rgb = rgb
    }

    func copy(colorSpace: CGColorSpace) -> CGImage? { nil }
}

final class CGColor {
    init(srgbRed: CGFloat, green: CGFloat, blue: CGFloat, alpha: CGFloat) {}
}

enum CGInterpolationQuality { case none, low, medium, high }
enum CGImageAlphaInfo: UInt32 { case none, noneSkipFirst }

struct CGBitmapInfo: OptionSet {
    let rawValue: UInt32
    static let byteOrder32Little = CGBitmapInfo(rawValue: 16)
}

final class CGContext {
    var interpolationQuality = CGInterpolationQuality.none
    private let data: UnsafeMutableRawPointer
    private let size: CGSize
    private let row: Int

    init?(
        data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int,
        bytesPerRow: Int, space: CGColorSpace, bitmapInfo: UInt32
    ) {
        self.data = data!
        size = CGSize(width: width, height: height)
        row = bytesPerRow
    }

    func setFillColor(_ color: CGColor) {}
    func fill(_ rect: CGRect) {}

    func draw(_ image: CGImage, in rect: CGRect) {
        precondition(rect == CGRect(origin: .zero, size: size), "it is drawn as it is")
        for (index, value) in image.rgb.enumerated() {
            let (y, x) = (index / 3).quotientAndRemainder(dividingBy: image.width)
            let place = y * row + 4 * x + 2 - index % 3
            data.storeBytes(of: value, toByteOffset: place, as: UInt8.self)
        }
    }
}

final class CVPixelBuffer {
    let width: Int
    let height: Int
    let row: Int
    let data: UnsafeMutableRawPointer

    init(_ width: Int, _ height: Int) {
        self.width = width
        self.height = height
        row = 4 * width + 64
        data = .allocate(byteCount: row * height, alignment: 64)
    }

    deinit { data.deallocate() }
}

struct CVPixelBufferLockFlags: OptionSet {
    let rawValue: UInt64
    static let readOnly = CVPixelBufferLockFlags(rawValue: 1)
}

let kCVPixelBufferIOSurfacePropertiesKey = "surface"
let kCVPixelFormatType_32BGRA: UInt32 = 1
let kCVReturnSuccess: Int32 = 0
let kCGImagePropertyPixelWidth = "width"
let kCGImagePropertyPixelHeight = "height"
let kCGImageSourceCreateThumbnailFromImageAlways = "always"
let kCGImageSourceCreateThumbnailWithTransform = "transform"
let kCGImageSourceThumbnailMaxPixelSize = "size"

func CVPixelBufferCreate(
    _: AnyObject?, _ width: Int, _ height: Int, _: UInt32, _: CFDictionary?,
    _ made: UnsafeMutablePointer<CVPixelBuffer?>
) -> Int32 {
    made.pointee = CVPixelBuffer(width, height)
    return kCVReturnSuccess
}

func CVPixelBufferLockBaseAddress(_: CVPixelBuffer, _: CVPixelBufferLockFlags) {}
func CVPixelBufferUnlockBaseAddress(_: CVPixelBuffer, _: CVPixelBufferLockFlags) {}
func CVPixelBufferGetBaseAddress(_ x: CVPixelBuffer) -> UnsafeMutableRawPointer? { x.data }
func CVPixelBufferGetBytesPerRow(_ x: CVPixelBuffer) -> Int { x.row }
func CVPixelBufferGetWidth(_ x: CVPixelBuffer) -> Int { x.width }
func CVPixelBufferGetHeight(_ x: CVPixelBuffer) -> Int { x.height }

final class CGImageSource {}
func CGImageSourceCreateWithURL(_: CFURL, _: CFDictionary?) -> CGImageSource? { nil }
func CGImageSourceCopyPropertiesAtIndex(
    _: CGImageSource, _: Int, _: CFDictionary?
) -> CFDictionary? { nil }
func CGImageSourceCreateThumbnailAtIndex(
    _: CGImageSource, _: Int, _: CFDictionary?
) -> CGImage? { nil }

// CryptoKit
struct SHA256 {
    typealias Digest = [UInt8]
    private var all = Data()

    mutating func update(data: Data) { all.append(data) }
    func finalize() -> Digest { SHA256.hash(data: all) }

    static func hash(data: Data) -> Digest {
        let told = Link.shared.ask(["call": "hash", "file": Link.shared.write(data)])
        return (told["bytes"] as! [Int]).map { UInt8($0) }
    }
}

// Tokenizers
protocol Tokenizer {
    func encode(text: String, addSpecialTokens: Bool) -> [Int]
    func decode(tokens: [Int], skipSpecialTokens: Bool) -> String
}

struct AskedTokenizer: Tokenizer {
    func encode(text: String, addSpecialTokens: Bool) -> [Int] {
        precondition(!addSpecialTokens)
        return Link.shared.ask(["call": "encode", "text": text])["ids"] as! [Int]
    }

    func decode(tokens: [Int], skipSpecialTokens: Bool) -> String {
        Link.shared.ask(["call": "decode", "ids": tokens])["text"] as! String
    }
}

enum AutoTokenizer {
    static func from(modelFolder: URL) async throws -> any Tokenizer { AskedTokenizer() }
}

// Core ML
enum MLMultiArrayDataType: String { case float32, float16, int32 }

final class MLMultiArray {
    static let gap = 24  // elements behind each row of what a model gives
    let shape: [NSNumber]
    let strides: [NSNumber]
    let dataType: MLMultiArrayDataType
    private let data: UnsafeMutableRawBufferPointer

    init(shape: [NSNumber], dataType: MLMultiArrayDataType, gap: Int = 0) throws {
        self.shape = shape
        self.dataType = dataType
        var steps: [Int] = []
        var step = 1
        for (axis, size) in shape.reversed().enumerated() {
            steps.insert(step, at: 0)
            step = step * size.intValue + (axis == 0 ? gap : 0)
        }
        strides = steps.map { NSNumber(value: $0) }
        data = .allocate(byteCount: step * (dataType == .float16 ? 2 : 4), alignment: 64)
        data.initializeMemory(as: UInt8.self, repeating: 0xff)  // NaN where nothing is written
    }

    deinit { data.deallocate() }

    var count: Int { shape.reduce(1) { $0 * $1.intValue } }

    func withUnsafeMutableBytes<R>(
        _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
    ) rethrows -> R { try body(data, strides.map(\.intValue)) }

    func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        try body(UnsafeRawBufferPointer(data))
    }

    subscript(index: Int) -> NSNumber {
        get { 0 }
        set { data.storeBytes(of: newValue.int32Value, toByteOffset: 4 * index, as: Int32.self) }
    }

    /// Rows in their places here, and their bytes.
    var rows: [UnsafeMutableRawBufferPointer] {
        let item = dataType == .float16 ? 2 : 4
        let last = shape.last!.intValue
        let step = shape.count > 1 ? strides[shape.count - 2].intValue : last
        return (0..<count / last).map { row in
            UnsafeMutableRawBufferPointer(
                rebasing: data[row * step * item..<(row * step + last) * item])
        }
    }
}

final class MLFeatureValue {
    let multiArrayValue: MLMultiArray?
    let pixels: CVPixelBuffer?

    init(multiArray: MLMultiArray) {
        multiArrayValue = multiArray
        pixels = nil
    }

    init(pixelBuffer: CVPixelBuffer) {
        multiArrayValue = nil
        pixels = pixelBuffer
    }

    var asked: [String: Any] {
        if let pixels {
            let file = Link.shared.write(Data(bytes: pixels.data, count: pixels.row * pixels.height))
            let shape = [pixels.height, pixels.row / 4, 4]
            return ["dtype": "bgra", "shape": shape, "width": pixels.width, "file": file]
        }
        let array = multiArrayValue!
        let file = Link.shared.write(array.rows.reduce(Data()) { $0 + $1 })
        let shape = array.shape.map(\.intValue)
        return ["dtype": array.dataType.rawValue, "shape": shape, "file": file]
    }
}

protocol MLFeatureProvider {
    func featureValue(for name: String) -> MLFeatureValue?
}

final class MLDictionaryFeatureProvider: MLFeatureProvider {
    let values: [String: MLFeatureValue]
    init(dictionary: [String: Any]) throws { values = dictionary as! [String: MLFeatureValue] }
    func featureValue(for name: String) -> MLFeatureValue? { values[name] }
}

enum MLComputeUnits { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

final class MLModelConfiguration {
    var computeUnits = MLComputeUnits.all
    var functionName: String?
}

final class MLState {
    nonisolated(unsafe) static var made = 0
    let number: Int
    init() {
        MLState.made += 1
        number = MLState.made
    }
}

final class MLModel: @unchecked Sendable {
    private let package: String
    private let function: String

    private init(_ package: String, _ function: String) {
        self.package = package
        self.function = function
    }

    static func compileModel(at url: URL) async throws -> URL {
        let made = URL(fileURLWithPath: Link.shared.write(Data(url.lastPathComponent.utf8)))
        let compiled = made.appendingPathExtension("mlmodelc")
        try FileManager.default.moveItem(at: made, to: compiled)
        return compiled
    }

    static func load(
        contentsOf url: URL, configuration: MLModelConfiguration
    ) async throws -> MLModel {
        let package = try String(contentsOf: url, encoding: .utf8)
        return MLModel(package, configuration.functionName ?? "main")
    }

    func makeState() -> MLState { MLState() }

    func prediction(from inputs: any MLFeatureProvider) throws -> any MLFeatureProvider {
        try run(inputs, 0)
    }

    func prediction(
        from inputs: any MLFeatureProvider, using state: MLState
    ) throws -> any MLFeatureProvider { try run(inputs, state.number) }

    private func run(_ inputs: any MLFeatureProvider, _ state: Int) throws -> MLFeatureProvider {
        let values = (inputs as! MLDictionaryFeatureProvider).values.mapValues(\.asked)
        let told = Link.shared.ask([
            "call": "run", "package": package, "function": function, "state": state,
            "inputs": values,
        ])
        let outputs = try (told["outputs"] as! [String: [String: Any]]).mapValues { output in
            let shape = (output["shape"] as! [Int]).map { NSNumber(value: $0) }
            let array = try MLMultiArray(shape: shape, dataType: .float16, gap: MLMultiArray.gap)
            let data = try Data(contentsOf: URL(fileURLWithPath: output["file"] as! String))
            var place = 0
            for row in array.rows {
                row.copyBytes(from: data[place..<place + row.count])
                place += row.count
            }
            return MLFeatureValue(multiArray: array)
        }
        return try MLDictionaryFeatureProvider(dictionary: outputs)
    }
}
