// UIKit, as far as EdgeVLM uses it; a declaration's source is the page named before it, under
// developer.apple.com/documentation.

import CoreGraphics

// uikit/uiimage: cgImage, imageOrientation; uikit/uiimage/orientation
public final class UIImage: @unchecked Sendable {
    public enum Orientation: Int, Sendable {
        case up, down, left, right, upMirrored, downMirrored, leftMirrored, rightMirrored
    }
    public let cgImage: CGImage?
    public let imageOrientation: Orientation
    public init(cgImage: CGImage, scale: CGFloat, orientation: Orientation) {
        self.cgImage = cgImage
        imageOrientation = orientation
    }
}
