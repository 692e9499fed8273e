// Core Graphics' and Core Video's pictures -> RGB in 8 bits. A picture is drawn in its own colour
// space, so that its numbers stay what they are, on white.

import CoreGraphics
import CoreVideo
import Foundation

enum PixelReader {
    static func read(_ image: CGImage) throws -> Raster {
        let own = image.colorSpace
        switch own?.model {
        case .monochrome:
            if let own, let drawn = draw(image, own, channels: 1) {
                return raster(image, drawn.flatMap { [$0, $0, $0] })
            }
        case .cmyk:
            if let own, let drawn = draw(image, own, channels: 4, layout: CGImageAlphaInfo.none) {
                return raster(image, rgb(cmyk: drawn))
            }
        case .rgb:
            if let own, let drawn = draw(image, own, channels: 4) {
                return raster(image, threeOfFour(drawn))
            }
        default: break
        }
        // Palettes, Lab, and what no context takes as it is.
        guard let device = CGColorSpace(name: CGColorSpace.sRGB),
            let drawn = draw(image, device, channels: 4)
        else {
            throw EdgeVLMError(
                "no memory for a picture of \(image.width) x \(image.height)",
                "use a smaller picture")
        }
        return raster(image, threeOfFour(drawn))
    }

    private static func raster(_ image: CGImage, _ rgb: [UInt8]) -> Raster {
        Raster(width: image.width, height: image.height, rgb: rgb)
    }

    /// The picture on white, `channels` bytes a pixel; nil where there is no such context.
    private static func draw(
        _ image: CGImage, _ space: CGColorSpace, channels: Int,
        layout: CGImageAlphaInfo? = nil
    ) -> [UInt8]? {
        let info = layout ?? (channels == 1 ? CGImageAlphaInfo.none : .noneSkipLast)
        // White is all light, or no ink.
        let white: UInt8 = channels == 4 && info == CGImageAlphaInfo.none ? 0 : 255
        var bytes = [UInt8](repeating: white, count: channels * image.width * image.height)
        let drawn = bytes.withUnsafeMutableBytes { buffer in
            guard
                let context = CGContext(
                    data: buffer.baseAddress, width: image.width, height: image.height,
                    bitsPerComponent: 8, bytesPerRow: channels * image.width, space: space,
                    bitmapInfo: info.rawValue)
            else { return false }
            context.interpolationQuality = .none
            context.draw(
                image, in: CGRect(x: 0, y: 0, width: image.width, height: image.height))
            return true
        }
        return drawn ? bytes : nil
    }

    private static func threeOfFour(_ bytes: [UInt8]) -> [UInt8] {
        var rgb = [UInt8](repeating: 0, count: bytes.count / 4 * 3)
        for pixel in 0..<bytes.count / 4 {
            for channel in 0..<3 { rgb[3 * pixel + channel] = bytes[4 * pixel + channel] }
        }
        return rgb
    }

    /// Ink to light as Pillow's cmyk2rgb does, whatever the profile.
    static func rgb(cmyk bytes: [UInt8]) -> [UInt8] {
        var rgb = [UInt8](repeating: 0, count: bytes.count / 4 * 3)
        for pixel in 0..<bytes.count / 4 {
            let light = 255 - Int(bytes[4 * pixel + 3])
            for channel in 0..<3 {
                let product = Int(bytes[4 * pixel + channel]) * light + 128
                let ink = ((product >> 8) + product) >> 8
                rgb[3 * pixel + channel] = UInt8(max(0, light - ink))
            }
        }
        return rgb
    }

    static func read(_ buffer: CVPixelBuffer) throws -> Raster {
        CVPixelBufferLockBaseAddress(buffer, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(buffer, .readOnly) }
        let width = CVPixelBufferGetWidth(buffer)
        let height = CVPixelBufferGetHeight(buffer)
        switch CVPixelBufferGetPixelFormatType(buffer) {
        case kCVPixelFormatType_32BGRA:
            guard let base = CVPixelBufferGetBaseAddress(buffer) else { break }
            let row = CVPixelBufferGetBytesPerRow(buffer)
            return Raster(width: width, height: height, rgb: rgb(bgra: base, width, height, row))
        case kCVPixelFormatType_420YpCbCr8BiPlanarFullRange:
            return Raster(width: width, height: height, rgb: try rgb(planes: buffer, full: true))
        case kCVPixelFormatType_420YpCbCr8BiPlanarVideoRange:
            return Raster(width: width, height: height, rgb: try rgb(planes: buffer, full: false))
        default:
            throw EdgeVLMError(
                "the frame's pixel format is not known",
                "ask the camera for kCVPixelFormatType_32BGRA")
        }
        throw EdgeVLMError("the frame's pixels cannot be read", "take the next frame")
    }

    private static func rgb(
        bgra base: UnsafeMutableRawPointer, _ width: Int, _ height: Int, _ row: Int
    ) -> [UInt8] {
        var rgb = [UInt8](repeating: 0, count: 3 * width * height)
        for y in 0..<height {
            let line = base.advanced(by: y * row).assumingMemoryBound(to: UInt8.self)
            for x in 0..<width {
                let to = 3 * (y * width + x)
                rgb[to] = line[4 * x + 2]
                rgb[to + 1] = line[4 * x + 1]
                rgb[to + 2] = line[4 * x]
            }
        }
        return rgb
    }

    /// Brightness, and two colours for each 2 x 2 pixels, by ITU-R BT.709 (BT.601 below 720 rows).
    private static func rgb(planes buffer: CVPixelBuffer, full: Bool) throws -> [UInt8] {
        guard CVPixelBufferGetPlaneCount(buffer) == 2,
            let lumaBase = CVPixelBufferGetBaseAddressOfPlane(buffer, 0),
            let chromaBase = CVPixelBufferGetBaseAddressOfPlane(buffer, 1)
        else {
            throw EdgeVLMError("the frame's pixels cannot be read", "take the next frame")
        }
        let width = CVPixelBufferGetWidth(buffer)
        let height = CVPixelBufferGetHeight(buffer)
        let lumaRow = CVPixelBufferGetBytesPerRowOfPlane(buffer, 0)
        let chromaRow = CVPixelBufferGetBytesPerRowOfPlane(buffer, 1)
        let colours = YCbCr(full: full, highDefinition: min(width, height) >= 720)
        var rgb = [UInt8](repeating: 0, count: 3 * width * height)
        for y in 0..<height {
            let luma = lumaBase.advanced(by: y * lumaRow).assumingMemoryBound(to: UInt8.self)
            let chroma = chromaBase.advanced(by: y / 2 * chromaRow)
                .assumingMemoryBound(to: UInt8.self)
            for x in 0..<width {
                let pixel = colours.rgb(luma[x], chroma[x / 2 * 2], chroma[x / 2 * 2 + 1])
                let to = 3 * (y * width + x)
                (rgb[to], rgb[to + 1], rgb[to + 2]) = pixel
            }
        }
        return rgb
    }

    /// A buffer that the GPU and the Neural Engine share with the CPU.
    static func surface(_ width: Int, _ height: Int, _ format: OSType) throws -> CVPixelBuffer {
        var buffer: CVPixelBuffer?
        let attributes = [kCVPixelBufferIOSurfacePropertiesKey: [:] as CFDictionary] as CFDictionary
        let status = CVPixelBufferCreate(nil, width, height, format, attributes, &buffer)
        guard status == kCVReturnSuccess, let buffer else {
            throw EdgeVLMError(
                "no memory for an array of \(width) x \(height)",
                "close other apps, or unload the model")
        }
        return buffer
    }

    /// RGB -> a 32BGRA buffer that Core ML takes.
    static func buffer(_ raster: Raster) throws -> CVPixelBuffer {
        let buffer = try surface(raster.width, raster.height, kCVPixelFormatType_32BGRA)
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else {
            throw EdgeVLMError("a picture's buffer has no memory", "close other apps")
        }
        let row = CVPixelBufferGetBytesPerRow(buffer)
        for y in 0..<raster.height {
            let line = base.advanced(by: y * row).assumingMemoryBound(to: UInt8.self)
            for x in 0..<raster.width {
                let from = 3 * (y * raster.width + x)
                line[4 * x] = raster.rgb[from + 2]
                line[4 * x + 1] = raster.rgb[from + 1]
                line[4 * x + 2] = raster.rgb[from]
                line[4 * x + 3] = 255
            }
        }
        return buffer
    }
}

/// A camera's colours -> red, green and blue. Source: ITU-R BT.601 and BT.709.
struct YCbCr {
    private let scale, offset, chroma, red, greenBlue, greenRed, blue: Float

    init(full: Bool, highDefinition: Bool) {
        let (kr, kb): (Float, Float) = highDefinition ? (0.2126, 0.0722) : (0.299, 0.114)
        scale = full ? 1 : 255 / 219
        offset = full ? 0 : 16
        chroma = full ? 1 : 255 / 224
        red = 2 * (1 - kr)
        blue = 2 * (1 - kb)
        greenRed = 2 * kr * (1 - kr) / (1 - kr - kb)
        greenBlue = 2 * kb * (1 - kb) / (1 - kr - kb)
    }

    func rgb(_ y: UInt8, _ cb: UInt8, _ cr: UInt8) -> (UInt8, UInt8, UInt8) {
        let light = (Float(y) - offset) * scale
        let b = (Float(cb) - 128) * chroma
        let r = (Float(cr) - 128) * chroma
        return (
            level(light + red * r), level(light - greenBlue * b - greenRed * r),
            level(light + blue * b)
        )
    }

    private func level(_ value: Float) -> UInt8 { UInt8(max(0, min(255, value.rounded()))) }
}
