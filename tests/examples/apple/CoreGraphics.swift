// Core Graphics, as far as EdgeVLM uses it; a declaration's source is the page named before it,
// under developer.apple.com/documentation. Pictures are drawn as they are, on what is there.

@_exported import Foundation

// corefoundation/cfstring, cfurl, cfdata, cfdictionary: bridged to Foundation's by `as`.
public typealias CFString = String
public typealias CFURL = URL
public typealias CFData = Data
public typealias CFDictionary = [String: Any]

// coregraphics/cgcolorspacemodel
public enum CGColorSpaceModel: Int32, Sendable {
    case unknown = -1, monochrome, rgb, cmyk, lab, deviceN, indexed, pattern
}

// coregraphics/cgcolorspace: init?(name:), model, sRGB
public final class CGColorSpace: @unchecked Sendable {
    public static let sRGB: CFString = "kCGColorSpaceSRGB"
    public let model: CGColorSpaceModel
    public init?(name: CFString) { model = .rgb }
    public init(standIn model: CGColorSpaceModel) { self.model = model }
}

// coregraphics/cgimagealphainfo
public enum CGImageAlphaInfo: UInt32, Sendable {
    case none, premultipliedLast, premultipliedFirst, last, first, noneSkipLast, noneSkipFirst
    case alphaOnly
}

// coregraphics/cginterpolationquality
public enum CGInterpolationQuality: Int32, Sendable { case `default`, none, low, high, medium }

// coregraphics/cgimage: width, height, colorSpace
public final class CGImage: @unchecked Sendable {
    public let width: Int
    public let height: Int
    public let colorSpace: CGColorSpace?
    /// Grey, red to alpha, or four inks.
    public let standIn: [UInt8]
    public init(standIn: [UInt8], width: Int, height: Int, model: CGColorSpaceModel) {
        self.width = width
        self.height = height
        self.standIn = standIn
        colorSpace = CGColorSpace(standIn: model)
    }
}

// coregraphics/cgcontext: init?(data:width:height:bitsPerComponent:bytesPerRow:space:bitmapInfo:),
// interpolationQuality, draw(_:in:byTiling:)
public final class CGContext {
    public var interpolationQuality = CGInterpolationQuality.default
    private let data: UnsafeMutableRawPointer
    private let channels: Int

    public init?(
        data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int,
        bytesPerRow: Int, space: CGColorSpace, bitmapInfo: UInt32
    ) {
        guard let data else { return nil }
        self.data = data
        channels = bytesPerRow / width
    }

    public func draw(_ image: CGImage, in rect: CGRect, byTiling: Bool = false) {
        let colours = image.colorSpace?.model == .monochrome ? 1 : 4
        let inks = image.colorSpace?.model == .cmyk
        for pixel in 0..<image.width * image.height {
            let alpha = colours == 1 || inks ? 255 : Int(image.standIn[4 * pixel + 3])
            for channel in 0..<min(channels, inks ? 4 : 3) {
                let place = channels * pixel + channel
                let under = Int(data.load(fromByteOffset: place, as: UInt8.self))
                let over = Int(image.standIn[colours * pixel + (colours == 1 ? 0 : channel)])
                let mixed = (over * alpha + under * (255 - alpha) + 127) / 255
                data.storeBytes(of: UInt8(mixed), toByteOffset: place, as: UInt8.self)
            }
        }
    }
}
