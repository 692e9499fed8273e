// Core ML's arrays <-> Swift's. What Core ML gives back may have gaps between its rows, so that
// elements are looked up by the array's strides.

import CoreML
import CoreVideo
import Foundation

#if (os(macOS) || targetEnvironment(macCatalyst)) && arch(x86_64)
/// Intel Macs have no Float16. With this an app for both chips compiles, and `Runnable` refuses to
/// run on them.
typealias Float16 = Float
#endif

extension MLMultiArray {
    /// Columns of arrays that share an IOSurface: shorter rows would be mostly gap, and longer ones
    /// are beyond the widest texture of Apple's GPUs.
    private static let surfaceColumns = 32...16_384

    /// A float16 array of zeros that a device reads and writes in place, where its rows allow it.
    static func half(_ shape: [Int]) throws -> MLMultiArray {
        let columns = shape.last ?? 0
        let rows = shape.dropLast().reduce(1, *)
        let numbers = shape.map { NSNumber(value: $0) }
        let array: MLMultiArray
        if surfaceColumns.contains(columns), 1...surfaceColumns.upperBound ~= rows {
            let buffer = try PixelReader.surface(
                columns, rows, kCVPixelFormatType_OneComponent16Half)
            array = MLMultiArray(pixelBuffer: buffer, shape: numbers)
        } else {
            array = try MLMultiArray(shape: numbers, dataType: .float16)
        }
        array.writeRows { _, row in row.update(repeating: 0) }
        return array
    }

    /// Write the rows of the last axis, each with its number.
    func writeRows(_ write: (Int, UnsafeMutableBufferPointer<Float16>) -> Void) {
        let sizes = shape.map(\.intValue)
        guard let columns = sizes.last, !sizes.contains(0) else { return }
        let outer = Array(sizes.dropLast())
        withUnsafeMutableBytes { bytes, steps in
            let values = bytes.bindMemory(to: Float16.self)
            for row in 0..<outer.reduce(1, *) {
                let start = Self.place(row, outer, steps)
                write(row, UnsafeMutableBufferPointer(rebasing: values[start..<start + columns]))
            }
        }
    }

    /// Of values one after the other.
    static func half(_ shape: [Int], values: [Float16]) throws -> MLMultiArray {
        let array = try half(shape)
        let columns = shape.last ?? 0
        array.writeRows { row, place in
            _ = place.update(from: values[row * columns..<(row + 1) * columns])
        }
        return array
    }

    static func single(_ value: Int) throws -> MLMultiArray {
        let array = try MLMultiArray(shape: [1], dataType: .int32)
        array[0] = NSNumber(value: value)
        return array
    }

    /// One value, by its number with the last axis running fastest.
    func half(at number: Int, _ name: String) throws -> Float16 {
        let sizes = shape.map(\.intValue)
        let place = Self.place(number, sizes, strides.map(\.intValue))
        return try withUnsafeBytes { bytes in
            switch dataType {
            case .float16: return bytes.bindMemory(to: Float16.self)[place]
            case .float32: return Float16(bytes.bindMemory(to: Float.self)[place])
            default: throw EdgeVLMError("\(name): neither float16 nor float32", exportAgain)
            }
        }
    }

    /// All values in the order of their indices.
    func halves(_ name: String) throws -> [Float16] {
        let sizes = shape.map(\.intValue)
        let steps = strides.map(\.intValue)
        switch dataType {
        case .float16:
            return withUnsafeBytes { bytes in
                Self.ordered(bytes.bindMemory(to: Float16.self), sizes, steps)
            }
        case .float32:
            return withUnsafeBytes { bytes in
                Self.ordered(bytes.bindMemory(to: Float.self), sizes, steps).map { Float16($0) }
            }
        default:
            throw EdgeVLMError("\(name): neither float16 nor float32", exportAgain)
        }
    }

    /// A row of the last axis at a time.
    private static func ordered<Value>(
        _ values: UnsafeBufferPointer<Value>, _ sizes: [Int], _ steps: [Int]
    ) -> [Value] {
        guard let width = sizes.last, let step = steps.last, !sizes.contains(0) else { return [] }
        let outer = Array(sizes.dropLast())
        let rows = outer.reduce(1, *)
        var result: [Value] = []
        result.reserveCapacity(rows * width)
        for row in 0..<rows {
            let start = place(row, outer, steps)
            if step == 1 {
                result += values[start..<start + width]
            } else {
                for index in 0..<width { result.append(values[start + index * step]) }
            }
        }
        return result
    }

    /// Where an element lies, counted with the last axis running fastest.
    ///
    /// place(5, [2, 3], [8, 1]) is 1 * 8 + 2 * 1 = 10.
    private static func place(_ number: Int, _ sizes: [Int], _ steps: [Int]) -> Int {
        var rest = number
        var place = 0
        for axis in sizes.indices.reversed() where sizes[axis] > 1 {
            place += rest % sizes[axis] * steps[axis]
            rest /= sizes[axis]
        }
        return place
    }

    /// Write the first `count` positions of `new` [layers, heads, dim, n] at `offset` of this cache
    /// [layers, heads, dim, context].
    func write(_ new: MLMultiArray, count: Int, at offset: Int) throws {
        let sizes = shape.map(\.intValue)
        let from = new.strides.map(\.intValue)
        guard dataType == .float16, new.dataType == .float16, sizes.count == 4, from.count == 4,
            new.shape[3].intValue >= count, offset + count <= sizes[3]
        else {
            throw EdgeVLMError(
                "the decoder's new keys and values do not fit its cache", exportAgain)
        }
        withUnsafeMutableBytes { own, to in
            new.withUnsafeBytes { other in
                let target = own.bindMemory(to: Float16.self)
                let source = other.bindMemory(to: Float16.self)
                for number in 0..<sizes[0] * sizes[1] * sizes[2] {
                    let row = number % sizes[2]
                    let head = number / sizes[2] % sizes[1]
                    let layer = number / (sizes[2] * sizes[1])
                    let there = layer * to[0] + head * to[1] + row * to[2] + offset * to[3]
                    let here = layer * from[0] + head * from[1] + row * from[2]
                    for index in 0..<count {
                        target[there + index * to[3]] = source[here + index * from[3]]
                    }
                }
            }
        }
    }
}
