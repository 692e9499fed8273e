// Core ML, as far as EdgeVLM uses it; a declaration's source is the page named before it, under
// developer.apple.com/documentation. Predictions go through the pipes to the test's interpreter.
// No class is Sendable here, whatever they are in Apple's SDK: the stricter reading must compile.

import CoreVideo
import Foundation
import Link

// coreml/mlmultiarraydatatype
public enum MLMultiArrayDataType: String { case float32, float16, int32 }

// coreml/mlmultiarray: init(shape:dataType:), init(pixelBuffer:shape:) (float16; the last size is
// the buffer's width, the product of the others its height), shape, strides, dataType, count,
// subscript(_:), withUnsafeBytes(_:), withUnsafeMutableBytes(_:)
public final class MLMultiArray {
    static let gap = 24  // elements behind each row of what a model gives
    public let shape: [NSNumber]
    public let strides: [NSNumber]
    public let dataType: MLMultiArrayDataType
    private let data: UnsafeMutableRawBufferPointer
    private let pixels: CVPixelBuffer?

    public init(shape: [NSNumber], dataType: MLMultiArrayDataType, gap: Int = 0) throws {
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
        pixels = nil
    }

    public init(pixelBuffer: CVPixelBuffer, shape: [NSNumber]) {
        let rows = shape.dropLast().reduce(1) { $0 * $1.intValue }
        let isOne = CVPixelBufferGetPixelFormatType(pixelBuffer)
            == kCVPixelFormatType_OneComponent16Half
        guard isOne, shape.last?.intValue == pixelBuffer.width, rows == pixelBuffer.height else {
            fatalError("no such array in this pixel buffer")
        }
        self.shape = shape
        dataType = .float16
        var steps = [1]
        var step = pixelBuffer.row / 2
        for size in shape.dropLast().reversed() {
            steps.insert(step, at: 0)
            step *= size.intValue
        }
        strides = steps.map { NSNumber(value: $0) }
        data = UnsafeMutableRawBufferPointer(
            start: pixelBuffer.data, count: pixelBuffer.row * pixelBuffer.height)
        data.initializeMemory(as: UInt8.self, repeating: 0xff)
        pixels = pixelBuffer
    }

    deinit { if pixels == nil { data.deallocate() } }

    /// Whether it is an IOSurface's.
    var isShared: Bool { pixels != nil }

    public var count: Int { shape.reduce(1) { $0 * $1.intValue } }

    public func withUnsafeMutableBytes<R>(
        _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
    ) rethrows -> R { try body(data, strides.map(\.intValue)) }

    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        try body(UnsafeRawBufferPointer(data))
    }

    public subscript(index: Int) -> NSNumber {
        get { NSNumber(value: data.load(fromByteOffset: 4 * index, as: Int32.self)) }
        set { data.storeBytes(of: newValue.int32Value, toByteOffset: 4 * index, as: Int32.self) }
    }

    /// With the values of a file, row after row.
    func fill(_ file: String) {
        let data = try! Data(contentsOf: URL(fileURLWithPath: file))
        var place = 0
        for row in rows {
            row.copyBytes(from: data[place..<place + row.count])
            place += row.count
        }
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

// coreml/mlfeaturevalue: init(multiArray:), init(pixelBuffer:), multiArrayValue
public final class MLFeatureValue {
    public let multiArrayValue: MLMultiArray?
    let pixels: CVPixelBuffer?

    public init(multiArray: MLMultiArray) {
        multiArrayValue = multiArray
        pixels = nil
    }

    public init(pixelBuffer: CVPixelBuffer) {
        multiArrayValue = nil
        pixels = pixelBuffer
    }

    var asked: [String: Any] {
        if let pixels {
            let bytes = Data(bytes: pixels.data, count: pixels.row * pixels.height)
            let file = Link.shared.write(bytes)
            let shape = [pixels.height, pixels.row / 4, 4]
            return ["dtype": "bgra", "shape": shape, "width": pixels.width, "file": file]
        }
        let array = multiArrayValue!
        let file = Link.shared.write(array.rows.reduce(Data()) { $0 + $1 })
        let shape = array.shape.map(\.intValue)
        return [
            "dtype": array.dataType.rawValue, "shape": shape, "file": file,
            "shared": array.isShared,
        ]
    }
}

// coreml/mlfeatureprovider: featureValue(for:)
public protocol MLFeatureProvider {
    func featureValue(for name: String) -> MLFeatureValue?
}

// coreml/mldictionaryfeatureprovider: init(dictionary:)
public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    let values: [String: MLFeatureValue]
    public init(dictionary: [String: Any]) throws {
        values = dictionary as! [String: MLFeatureValue]
    }
    public func featureValue(for name: String) -> MLFeatureValue? { values[name] }
}

// coreml/mlcomputeunits
public enum MLComputeUnits: Int, Sendable { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

// coreml/mlmodelconfiguration: computeUnits, functionName
public final class MLModelConfiguration {
    public init() {}
    public var computeUnits = MLComputeUnits.all
    public var functionName: String?
}

// coreml/mlpredictionoptions: init(), outputBackings. A multiarray takes an output of its shape and
// type; Core ML may leave it aside, so here one of two is.
public final class MLPredictionOptions {
    public init() {}
    public var outputBackings: [String: Any] = [:]

    /// What an output goes into.
    func array(
        _ name: String, _ shape: [NSNumber], _ dataType: MLMultiArrayDataType, _ call: Int
    ) throws -> MLMultiArray {
        guard let backing = outputBackings[name] as? MLMultiArray, call % 2 == 0 else {
            return try MLMultiArray(shape: shape, dataType: dataType, gap: MLMultiArray.gap)
        }
        guard backing.shape == shape, backing.dataType == dataType else {
            throw Failed(error: "the backing of \(name) is of another shape or type")
        }
        return backing
    }
}

struct Failed: Error { let error: String }

// coreml/mlstate: withMultiArray(for:_:), whose array is read and written in its place
public final class MLState {
    nonisolated(unsafe) static var made = 0
    let number: Int
    private let package, function: String

    init(_ package: String, _ function: String) {
        MLState.made += 1
        number = MLState.made
        self.package = package
        self.function = function
    }

    public func withMultiArray<R>(
        for stateName: String, _ body: (MLMultiArray) throws -> R
    ) rethrows -> R {
        var asked: [String: Any] = [
            "call": "state", "package": package, "function": function, "state": number,
            "name": stateName,
        ]
        let told = Link.shared.ask(asked)
        let shape = (told["shape"] as! [Int]).map { NSNumber(value: $0) }
        let array = try! MLMultiArray(shape: shape, dataType: .float16, gap: MLMultiArray.gap)
        array.fill(told["file"] as! String)
        let result = try body(array)
        asked["values"] = MLFeatureValue(multiArray: array).asked
        _ = Link.shared.ask(asked)
        return result
    }
}

// coreml/mlmodel: compileModel(at:), load(contentsOf:configuration:), makeState(),
// prediction(from:), prediction(from:options:), prediction(from:using:options:)
public final class MLModel {
    nonisolated(unsafe) private static var calls = 0
    private let package: String
    private let function: String
    private let units: MLComputeUnits

    private init(_ package: String, _ function: String, _ units: MLComputeUnits) {
        self.package = package
        self.function = function
        self.units = units
    }

    public static func compileModel(at url: URL) async throws -> URL {
        let made = URL(fileURLWithPath: Link.shared.write(Data(url.lastPathComponent.utf8)))
        let compiled = made.appendingPathExtension("mlmodelc")
        try FileManager.default.moveItem(at: made, to: compiled)
        return compiled
    }

    public static func load(
        contentsOf url: URL, configuration: MLModelConfiguration
    ) async throws -> MLModel {
        let package = try String(contentsOf: url, encoding: .utf8)
        let function = configuration.functionName ?? "main"
        let told = Link.shared.ask([
            "call": "load", "package": package, "function": function,
            "units": "\(configuration.computeUnits)",
        ])
        if told["dies"] != nil { exit(9) }
        return MLModel(package, function, configuration.computeUnits)
    }

    public func makeState() -> MLState { MLState(package, function) }

    public func prediction(from inputs: any MLFeatureProvider) throws -> any MLFeatureProvider {
        try run(inputs, 0, MLPredictionOptions())
    }

    public func prediction(
        from inputs: any MLFeatureProvider, options: MLPredictionOptions
    ) throws -> any MLFeatureProvider { try run(inputs, 0, options) }

    public func prediction(
        from inputs: any MLFeatureProvider, using state: MLState, options: MLPredictionOptions
    ) throws -> any MLFeatureProvider { try run(inputs, state.number, options) }

    private func run(
        _ inputs: any MLFeatureProvider, _ state: Int, _ options: MLPredictionOptions
    ) throws -> MLFeatureProvider {
        MLModel.calls += 1
        let values = (inputs as! MLDictionaryFeatureProvider).values.mapValues(\.asked)
        let told = Link.shared.ask([
            "call": "run", "package": package, "function": function, "state": state,
            "units": "\(units)", "inputs": values,
            "backed": options.outputBackings.keys.sorted(),
        ])
        if told["dies"] != nil { exit(9) }
        if let error = told["error"] { throw Failed(error: "\(error)") }
        var outputs: [String: MLFeatureValue] = [:]
        for (name, output) in told["outputs"] as! [String: [String: Any]] {
            let shape = (output["shape"] as! [Int]).map { NSNumber(value: $0) }
            let dataType = MLMultiArrayDataType(rawValue: output["dtype"] as! String)!
            let array = try options.array(name, shape, dataType, MLModel.calls)
            array.fill(output["file"] as! String)
            outputs[name] = MLFeatureValue(multiArray: array)
        }
        return try MLDictionaryFeatureProvider(dictionary: outputs)
    }
}
