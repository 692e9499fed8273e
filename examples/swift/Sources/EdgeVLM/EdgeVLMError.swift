// What went wrong, as one line for the person in front of the app: the cause and the remedy.

import Foundation

public struct EdgeVLMError: LocalizedError, CustomStringConvertible, Equatable, Sendable {
    public let cause: String
    public let remedy: String

    public init(_ cause: String, _ remedy: String) {
        self.cause = cause
        self.remedy = remedy
    }

    public var description: String { "\(cause); \(remedy)" }

    public var errorDescription: String? { description }
}

/// What is said where a bundle is not what its manifest says.
let exportAgain = "export the bundle again with mlx-vlm-edge export"
