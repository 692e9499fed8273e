// Core Video, as far as EdgeVLM uses it; a declaration's source is the page named before it, under
// developer.apple.com/documentation. Rows have gaps behind them, as they may on a device.

import CoreGraphics

public typealias OSType = UInt32
public typealias CVReturn = Int32
public typealias CFAllocator = Int

// corevideo/cvpixelbuffer
public final class CVPixelBuffer {
    let format: OSType
    public let width, height: Int
    /// Bytes of a row, and where the second plane begins.
    public let row: Int
    public let data: UnsafeMutableRawPointer
    let bytes: Int

    /// Bytes of a pixel, of formats of one plane.
    static let plain = [kCVPixelFormatType_32BGRA: 4, kCVPixelFormatType_OneComponent16Half: 2]

    public init(standIn format: OSType, _ width: Int, _ height: Int) {
        self.format = format
        self.width = width
        self.height = height
        row = width * (Self.plain[format] ?? 1) + 64
        let second = Self.plain[format] == nil ? (height + 1) / 2 : 0
        bytes = row * (height + second)
        data = .allocate(byteCount: bytes, alignment: 64)
        data.initializeMemory(as: UInt8.self, repeating: 0xAA, count: bytes)
    }

    deinit { data.deallocate() }
}

// corevideo/cvpixelbufferlockflags
public struct CVPixelBufferLockFlags: OptionSet, Sendable {
    public let rawValue: CVOptionFlags
    public init(rawValue: CVOptionFlags) { self.rawValue = rawValue }
    public static let readOnly = CVPixelBufferLockFlags(rawValue: 1)
}
public typealias CVOptionFlags = UInt64

// corevideo/kcvpixelbufferiosurfacepropertieskey, kcvreturnsuccess, cvpixelformattype constants
public let kCVPixelBufferIOSurfacePropertiesKey: CFString = "IOSurfaceProperties"
public let kCVReturnSuccess: CVReturn = 0
public let kCVPixelFormatType_32BGRA: OSType = 0x42475241
public let kCVPixelFormatType_OneComponent16Half: OSType = 0x4C303068
public let kCVPixelFormatType_420YpCbCr8BiPlanarFullRange: OSType = 0x34323066
public let kCVPixelFormatType_420YpCbCr8BiPlanarVideoRange: OSType = 0x34323076

// corevideo/cvpixelbuffercreate(_:_:_:_:_:_:)
public func CVPixelBufferCreate(
    _: CFAllocator?, _ width: Int, _ height: Int, _ format: OSType, _: CFDictionary?,
    _ out: UnsafeMutablePointer<CVPixelBuffer?>
) -> CVReturn {
    out.pointee = CVPixelBuffer(standIn: format, width, height)
    return kCVReturnSuccess
}

// corevideo/cvpixelbufferlockbaseaddress(_:_:), cvpixelbufferunlockbaseaddress(_:_:)
@discardableResult
public func CVPixelBufferLockBaseAddress(_: CVPixelBuffer, _: CVPixelBufferLockFlags) -> CVReturn {
    0
}
@discardableResult
public func CVPixelBufferUnlockBaseAddress(
    _: CVPixelBuffer, _: CVPixelBufferLockFlags
) -> CVReturn { 0 }

// corevideo/cvpixelbuffergetbaseaddress(_:), ...getbytesperrow(_:), ...getwidth(_:),
// ...getheight(_:), ...getpixelformattype(_:), and the same of a plane
public func CVPixelBufferGetBaseAddress(_ x: CVPixelBuffer) -> UnsafeMutableRawPointer? { x.data }
public func CVPixelBufferGetBytesPerRow(_ x: CVPixelBuffer) -> Int { x.row }
public func CVPixelBufferGetWidth(_ x: CVPixelBuffer) -> Int { x.width }
public func CVPixelBufferGetHeight(_ x: CVPixelBuffer) -> Int { x.height }
public func CVPixelBufferGetPixelFormatType(_ x: CVPixelBuffer) -> OSType { x.format }
public func CVPixelBufferGetPlaneCount(_ x: CVPixelBuffer) -> Int {
    CVPixelBuffer.plain[x.format] == nil ? 2 : 0
}
public func CVPixelBufferGetBaseAddressOfPlane(
    _ x: CVPixelBuffer, _ plane: Int
) -> UnsafeMutableRawPointer? { x.data.advanced(by: plane * x.row * x.height) }
public func CVPixelBufferGetBytesPerRowOfPlane(_ x: CVPixelBuffer, _: Int) -> Int { x.row }
