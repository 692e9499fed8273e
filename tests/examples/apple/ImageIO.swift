// Image I/O, as far as EdgeVLM uses it; a declaration's source is the page named before it, under
// developer.apple.com/documentation. Pillow decodes, on the other side of the pipes.

import CoreGraphics
import Link

// imageio/cgimagesource
public final class CGImageSource {
    let told: [String: Any]
    init?(_ file: String) {
        told = Link.shared.ask(["call": "picture", "file": file])
        if told["bytes"] == nil { return nil }
    }
}

// imageio/kcgimagepropertypixelwidth, kcgimagepropertypixelheight, kcgimagepropertyorientation
public let kCGImagePropertyPixelWidth: CFString = "PixelWidth"
public let kCGImagePropertyPixelHeight: CFString = "PixelHeight"
public let kCGImagePropertyOrientation: CFString = "Orientation"

// imageio/cgimagesourcecreatewithurl(_:_:)
public func CGImageSourceCreateWithURL(_ url: CFURL, _: CFDictionary?) -> CGImageSource? {
    CGImageSource(url.path)
}

// imageio/cgimagesourcecreatewithdata(_:_:)
public func CGImageSourceCreateWithData(_ data: CFData, _: CFDictionary?) -> CGImageSource? {
    CGImageSource(Link.shared.write(data))
}

// imageio/cgimagesourcecopypropertiesatindex(_:_:_:); a CFDictionary there, which is cast
public func CGImageSourceCopyPropertiesAtIndex(
    _ source: CGImageSource, _: Int, _: CFDictionary?
) -> Any? {
    [
        kCGImagePropertyPixelWidth: source.told["width"] as? Int ?? 0,
        kCGImagePropertyPixelHeight: source.told["height"] as? Int ?? 0,
        kCGImagePropertyOrientation: source.told["orientation"] as? Int ?? 1,
    ] as CFDictionary
}

// imageio/cgimagesourcecreateimageatindex(_:_:_:)
public func CGImageSourceCreateImageAtIndex(
    _ source: CGImageSource, _: Int, _: CFDictionary?
) -> CGImage? {
    guard let width = source.told["width"] as? Int, let height = source.told["height"] as? Int,
        let file = source.told["bytes"] as? String,
        let bytes = try? Data(contentsOf: URL(fileURLWithPath: file))
    else { return nil }
    let models: [String: CGColorSpaceModel] = [
        "L": .monochrome, "CMYK": .cmyk, "RGBA": .rgb, "P": .indexed,
    ]
    let model = models[source.told["model"] as? String ?? ""] ?? .unknown
    return CGImage(standIn: [UInt8](bytes), width: width, height: height, model: model)
}
