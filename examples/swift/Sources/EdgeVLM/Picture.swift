// A picture -> the pixels that the vision part takes: pad, center_crop or stretch, RGB 0..255.
// Places and sizes are those of the Python preprocessing (mlx_vlm_edge/image.py) to within a pixel.
// The values are not: Pillow's bicubic filter widens with the scale, CoreGraphics' is unspecified
// and may change with the system; a padded picture is resized and placed at once here, and padded
// before it is resized there. Colour profiles are ignored in both.

import CoreGraphics
import CoreVideo
import Foundation
import ImageIO

public enum Picture {
    /// The first picture of a file, upright by its EXIF orientation.
    public static func load(_ url: URL) throws -> CGImage {
        guard let source = CGImageSourceCreateWithURL(url as CFURL, nil),
            let properties = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any],
            let width = properties[kCGImagePropertyPixelWidth] as? Int,
            let height = properties[kCGImagePropertyPixelHeight] as? Int
        else {
            throw EdgeVLMError("\(url.path): not a picture that can be read; use PNG, JPEG or HEIC")
        }
        let options: [CFString: Any] = [
            kCGImageSourceCreateThumbnailFromImageAlways: true,
            kCGImageSourceCreateThumbnailWithTransform: true,
            kCGImageSourceThumbnailMaxPixelSize: max(width, height),
        ]
        guard
            let image = CGImageSourceCreateThumbnailAtIndex(source, 0, options as CFDictionary)
        else {
            throw EdgeVLMError("\(url.path): cannot be decoded; the picture may be damaged")
        }
        return image
    }

    /// A picture in the shape that the manifest asks for, as 32-bit BGRA.
    public static func pixelBuffer(
        _ image: CGImage, _ wanted: Manifest.Preprocessing
    ) throws -> CVPixelBuffer {
        let size = CGSize(width: wanted.width, height: wanted.height)
        let place = try rect(
            of: CGSize(width: image.width, height: image.height), in: size,
            strategy: wanted.strategy)
        guard wanted.color == "RGB", wanted.fill.count == 3 else {
            throw EdgeVLMError("manifest.json: its preprocessing is not one of RGB pictures")
        }
        let buffer = try makeBuffer(wanted.width, wanted.height)
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        let layout =
            CGImageAlphaInfo.noneSkipFirst.rawValue | CGBitmapInfo.byteOrder32Little.rawValue
        guard let space = CGColorSpace(name: CGColorSpace.sRGB),
            let context = CGContext(
                data: CVPixelBufferGetBaseAddress(buffer), width: wanted.width,
                height: wanted.height, bitsPerComponent: 8,
                bytesPerRow: CVPixelBufferGetBytesPerRow(buffer), space: space, bitmapInfo: layout)
        else {
            throw EdgeVLMError("no memory for a picture of \(wanted.width) x \(wanted.height)")
        }
        let fill = wanted.fill.map { CGFloat($0) / 255 }
        context.setFillColor(CGColor(srgbRed: fill[0], green: fill[1], blue: fill[2], alpha: 1))
        context.fill(CGRect(origin: .zero, size: size))
        // What shows through transparency.
        context.setFillColor(CGColor(srgbRed: 1, green: 1, blue: 1, alpha: 1))
        context.fill(place)
        context.interpolationQuality = .high
        context.draw(image.copy(colorSpace: space) ?? image, in: place)
        return buffer
    }

    /// Where a picture goes, in CoreGraphics' coordinates (y upwards).
    ///
    /// pad: 100 x 50 in 64 x 64 -> 64 x 32 in the middle. center_crop: 128 x 64, 32 cut off on
    /// either side.
    static func rect(of image: CGSize, in size: CGSize, strategy: String) throws -> CGRect {
        guard image.width >= 1, image.height >= 1 else {
            throw EdgeVLMError("the picture has no pixels")
        }
        let across = size.width / image.width
        let down = size.height / image.height
        let scale: CGFloat
        switch strategy {
        case "stretch": return CGRect(origin: .zero, size: size)
        case "pad": scale = min(across, down)
        case "center_crop": scale = max(across, down)
        default: throw EdgeVLMError("manifest.json: image strategy \(strategy) is not known")
        }
        let width = image.width * scale
        let height = image.height * scale
        return CGRect(
            x: (size.width - width) / 2, y: (size.height - height) / 2, width: width,
            height: height)
    }

    private static func makeBuffer(_ width: Int, _ height: Int) throws -> CVPixelBuffer {
        var buffer: CVPixelBuffer?
        let attributes = [kCVPixelBufferIOSurfacePropertiesKey: [:] as CFDictionary] as CFDictionary
        let status = CVPixelBufferCreate(
            nil, width, height, kCVPixelFormatType_32BGRA, attributes, &buffer)
        guard status == kCVReturnSuccess, let buffer else {
            throw EdgeVLMError("no memory for a picture of \(width) x \(height)")
        }
        return buffer
    }

    /// 32-bit BGRA -> red, green and blue planes of 0..255, one after the other.
    static func planes(_ buffer: CVPixelBuffer) throws -> [Float] {
        CVPixelBufferLockBaseAddress(buffer, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(buffer, .readOnly) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else {
            throw EdgeVLMError("the picture's pixels cannot be read")
        }
        let width = CVPixelBufferGetWidth(buffer)
        let height = CVPixelBufferGetHeight(buffer)
        let rowBytes = CVPixelBufferGetBytesPerRow(buffer)
        var planes = [Float](repeating: 0, count: 3 * width * height)
        for y in 0..<height {
            let row = base.advanced(by: y * rowBytes).assumingMemoryBound(to: UInt8.self)
            for x in 0..<width {
                for channel in 0..<3 {
                    planes[(channel * height + y) * width + x] = Float(row[4 * x + 2 - channel])
                }
            }
        }
        return planes
    }
}
