// AppKit, as far as EdgeVLM uses it; a declaration's source is the page named before it, under
// developer.apple.com/documentation. Only compiled: on a Mac it takes UIKit's place.

import CoreGraphics

// appkit/nsgraphicscontext, appkit/nsimagerep/hintkey
public final class NSGraphicsContext {}
public final class NSImageRep {
    public struct HintKey: Hashable, Sendable {}
}

// appkit/nsimage: cgImage(forProposedRect:context:hints:)
public final class NSImage {
    public func cgImage(
        forProposedRect proposedDestRect: UnsafeMutablePointer<NSRect>?,
        context referenceContext: NSGraphicsContext?, hints: [NSImageRep.HintKey: Any]?
    ) -> CGImage? { nil }
}
