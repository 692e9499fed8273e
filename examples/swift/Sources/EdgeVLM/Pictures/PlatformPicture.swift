// UIImage and NSImage -> a picture.

#if canImport(UIKit)
import UIKit

extension Picture {
    /// A UIImage, upright as the system shows it.
    public init(_ image: UIImage) throws {
        guard let pixels = image.cgImage else {
            throw EdgeVLMError("the image has no pixels of its own", "give its PNG data instead")
        }
        try self.init(pixels, orientation: Orientation(image.imageOrientation))
    }
}

extension Orientation {
    public init(_ orientation: UIImage.Orientation) {
        switch orientation {
        case .up: self = .up
        case .down: self = .down
        case .left: self = .left
        case .right: self = .right
        case .upMirrored: self = .upMirrored
        case .downMirrored: self = .downMirrored
        case .leftMirrored: self = .leftMirrored
        case .rightMirrored: self = .rightMirrored
        @unknown default: self = .up
        }
    }
}
#elseif canImport(AppKit)
import AppKit

extension Picture {
    /// An NSImage in the size of its largest representation.
    public init(_ image: NSImage) throws {
        guard let pixels = image.cgImage(forProposedRect: nil, context: nil, hints: nil) else {
            throw EdgeVLMError("the image has no pixels of its own", "give its PNG data instead")
        }
        try self.init(pixels)
    }
}
#endif
