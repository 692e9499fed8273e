// Anything that an app has a picture in -> upright RGB pixels in 8 bits, as the Python side reads
// them: turned by EXIF, transparency on white, colour profiles ignored, CMYK by Pillow's formula.

import CoreGraphics
import CoreVideo
import Foundation
import ImageIO

public struct Picture: Equatable, Sendable {
    /// What is read at most; checked before anything is decoded.
    public static let mostPixels = 178_956_970

    let raster: Raster

    public var width: Int { raster.width }
    public var height: Int { raster.height }

    init(_ raster: Raster) { self.raster = raster }

    /// RGB pixels, row after row, upright.
    public init(width: Int, height: Int, rgb: [UInt8]) throws {
        guard width > 0, height > 0, rgb.count == 3 * width * height else {
            throw EdgeVLMError(
                "\(rgb.count) bytes are not \(width) x \(height) pixels of red, green and blue",
                "give three bytes for each pixel")
        }
        raster = Raster(width: width, height: height, rgb: rgb)
    }

    /// The first picture of a file: PNG, JPEG, HEIC, TIFF and whatever else the system reads.
    public init(contentsOf url: URL) throws {
        guard let source = CGImageSourceCreateWithURL(url as CFURL, nil) else {
            throw EdgeVLMError("\(url.lastPathComponent): cannot be read", "check the file's path")
        }
        try self.init(source, url.lastPathComponent)
    }

    /// A file's content, such as a photo picker or a paste gives.
    public init(data: Data) throws {
        guard let source = CGImageSourceCreateWithData(data as CFData, nil) else {
            throw EdgeVLMError("the data cannot be read", "give a PNG, JPEG or HEIC file's content")
        }
        try self.init(source, "the picture")
    }

    private init(_ source: CGImageSource, _ name: String) throws {
        guard let found = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any]
        else {
            throw EdgeVLMError("\(name): not a picture", "use PNG, JPEG or HEIC")
        }
        let width = found[kCGImagePropertyPixelWidth] as? Int ?? 0
        let height = found[kCGImagePropertyPixelHeight] as? Int ?? 0
        try Self.check(width, height, name)
        guard let image = CGImageSourceCreateImageAtIndex(source, 0, nil) else {
            throw EdgeVLMError("\(name): cannot be decoded", "save it again; it may be damaged")
        }
        let number = found[kCGImagePropertyOrientation] as? Int ?? 1
        try self.init(image, orientation: Orientation(rawValue: number) ?? .up)
    }

    private static func check(_ width: Int, _ height: Int, _ name: String) throws {
        guard width > 0, height > 0 else {
            throw EdgeVLMError("\(name): has no pixels", "save it again; it may be damaged")
        }
        guard width * height <= mostPixels else {
            throw EdgeVLMError(
                "\(name): \(width) x \(height) pixels are more than "
                    + "\(mostPixels / 1_000_000) million",
                "make the picture smaller")
        }
    }

    /// A decoded picture; orientation: how its rows and columns lie, as EXIF counts it.
    public init(_ image: CGImage, orientation: Orientation = .up) throws {
        try Self.check(image.width, image.height, "the picture")
        raster = try PixelReader.read(image).upright(orientation)
    }

    /// A frame of a camera or a video, in 32BGRA or 420f / 420v.
    public init(_ buffer: CVPixelBuffer, orientation: Orientation = .up) throws {
        raster = try PixelReader.read(buffer).upright(orientation)
    }
}

/// EXIF's orientations, which are CGImagePropertyOrientation's: where row 0 and column 0 are.
public enum Orientation: Int, Sendable, CaseIterable {
    case up = 1, upMirrored, down, downMirrored, leftMirrored, right, rightMirrored, left
}

extension Raster {
    /// Turned and mirrored so that it is upright.
    func upright(_ orientation: Orientation) -> Raster {
        if orientation == .up { return self }
        let turned = orientation.rawValue > 4
        let (w, h) = turned ? (height, width) : (width, height)
        var out = [UInt8](repeating: 0, count: rgb.count)
        for y in 0..<h {
            for x in 0..<w {
                let (column, row) = source(x, y, orientation)
                let from = 3 * (row * width + column)
                let to = 3 * (y * w + x)
                for channel in 0..<3 { out[to + channel] = rgb[from + channel] }
            }
        }
        return Raster(width: w, height: h, rgb: out)
    }

    /// Where the upright pixel (x, y) lies here.
    private func source(_ x: Int, _ y: Int, _ orientation: Orientation) -> (Int, Int) {
        switch orientation {
        case .up: return (x, y)
        case .upMirrored: return (width - 1 - x, y)
        case .down: return (width - 1 - x, height - 1 - y)
        case .downMirrored: return (x, height - 1 - y)
        case .leftMirrored: return (y, x)
        case .right: return (y, height - 1 - x)
        case .rightMirrored: return (width - 1 - y, height - 1 - x)
        case .left: return (width - 1 - y, x)
        }
    }
}
