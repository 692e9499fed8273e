// What went wrong, as one line for the person in front of the app: the cause and the remedy.

import Foundation

public struct EdgeVLMError: LocalizedError, CustomStringConvertible, Sendable {
    public let description: String

    public init(_ description: String) {
        self.description = description
    }

    public var errorDescription: String? { description }
}
