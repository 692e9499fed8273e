// Core ML, as far as EdgeVLM uses it; a declaration's source is the page named before it, under
// developer.apple.com/documentation. Predictions go through the pipes to the test's interpreter.
// No class is Sendable here, whatever they are in Apple's SDK: the stricter reading must compile.

import CoreVideo
import Foundation
import Link

// coreml/mlmultiarraydatatype
public enum MLMultiArrayDataType: String { case float32, float16, int32 }

// coreml/mlmultiarray: init(shape:dataType:), shape, strides, dataType, count, subscript(_:),
// withUnsafeBytes(_:), withUnsafeMutableBytes(_:)
public final class MLMultiArray {
    static let gap = 24  // elements behind each row of what a model gives
    public let shape: [NSNumber]
    public let strides: [NSNumber]
    public let dataType: MLMultiArrayDataType
    private let data: UnsafeMutableRawBufferPointer

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
    }

    deinit { data.deallocate() }

    public var count: Int { shape.reduce(1) { $0 * $1.intValue } }

    public func withUnsafeMutableBytes<R>(
        _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
    ) rethrows -> R { try body(data, strides.map(\.intValue)) }

    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        try body(UnsafeRawBufferPointer(data))
    }

    public subscript(index: Int) -> NSNumber {
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
        return ["dtype": array.dataType.rawValue, "shape": shape, "file": file]
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

struct Failed: Error { let error: String }

// coreml/mlstate
public final class MLState {
    nonisolated(unsafe) static var made = 0
    let number: Int
    init() {
        MLState.made += 1
        number = MLState.made
    }
}

// coreml/mlmodel: compileModel(at:), load(contentsOf:configuration:), makeState(),
// prediction(from:), prediction(from:using:)
public final class MLModel {
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

    public func makeState() -> MLState { MLState() }

    public func prediction(from inputs: any MLFeatureProvider) throws -> any MLFeatureProvider {
        try run(inputs, 0)
    }

    public func prediction(
        from inputs: any MLFeatureProvider, using state: MLState
    ) throws -> any MLFeatureProvider { try run(inputs, state.number) }

    private func run(_ inputs: any MLFeatureProvider, _ state: Int) throws -> MLFeatureProvider {
        let values = (inputs as! MLDictionaryFeatureProvider).values.mapValues(\.asked)
        let told = Link.shared.ask([
            "call": "run", "package": package, "function": function, "state": state,
            "units": "\(units)",
            "inputs": values,
        ])
        if told["dies"] != nil { exit(9) }
        if let error = told["error"] { throw Failed(error: "\(error)") }
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
