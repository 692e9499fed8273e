// Heat and a lack of memory -> what the app does about it.

import Foundation

/// ProcessInfo.ThermalState's values, by their numbers.
public enum Heat: Int, Comparable, Sendable {
    case nominal, fair, serious, critical

    public static func < (one: Heat, other: Heat) -> Bool { one.rawValue < other.rawValue }
}

public struct Pressure: Equatable, Sendable {
    public enum Step: Equatable, Sendable {
        /// Seconds from one caption to the next at least; nil is none at all.
        case captions(every: Double?)
        case forgetPictures
        case unload
        case tell(String)
    }

    public private(set) var heat = Heat.nominal
    private var warnings = 0

    public init() {}

    /// It has become warmer or cooler.
    public mutating func became(_ heat: Heat) -> [Step] {
        defer { self.heat = heat }
        guard heat != self.heat else { return [] }
        switch heat {
        case .nominal: return [.captions(every: 0)]
        case .fair: return [.captions(every: 1)]
        case .serious:
            return [.captions(every: 4), .tell("The device is warm: captions are slower")]
        case .critical:
            return [.captions(every: nil), .tell("The device is hot: captions pause")]
        }
    }

    /// The system wants memory. Pictures go first; where that was not enough, the model does too,
    /// unless it is answering.
    public mutating func memoryWarning(busy: Bool) -> [Step] {
        warnings += 1
        if warnings == 1 || busy { return [.forgetPictures] }
        warnings = 0
        return [
            .forgetPictures, .unload,
            .tell(
                "The system needed memory, the model was unloaded; choose it in the settings"),
        ]
    }

    /// An answer came to its end: the memory was enough.
    public mutating func calm() { warnings = 0 }
}
