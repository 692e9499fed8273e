// What a user sets -> options of a question; kept as JSON under one key.

import EdgeVLM
import Foundation

/// Not Settings, which SwiftUI has.
public struct AppSettings: Codable, Equatable, Sendable {
    public var bundle: String?
    public var maxTokens = 240
    public var temperature = 0.0
    public var topP = 1.0
    /// Instructions in the place of the model's own; empty is none.
    public var system = ""
    /// Questions a tap away, and what the camera asks.
    public var presets = [
        "Describe the picture in one sentence.", "What is written here?", "What is this?",
    ]
    public var cameraQuestion = "Describe what is to be seen, in at most ten words."

    public init() {}

    /// The presets as they are edited, one a line.
    public var presetLines: String {
        get { presets.joined(separator: "\n") }
        set {
            presets = newValue.split(separator: "\n", omittingEmptySubsequences: false).map {
                String($0)
            }
        }
    }

    /// Each preset that says something, once.
    public var shownPresets: [String] {
        var seen: Set<String> = []
        return presets.map { $0.trimmingCharacters(in: .whitespacesAndNewlines) }
            .filter { !$0.isEmpty && seen.insert($0).inserted }
    }

    /// `system` as a session takes it: nil for the model's own.
    public var instructions: String? {
        let text = system.trimmingCharacters(in: .whitespacesAndNewlines)
        return text.isEmpty ? nil : text
    }

    public var options: AnswerOptions {
        AnswerOptions(
            maxTokens: max(1, maxTokens), temperature: Float(max(0, temperature)),
            topP: Float(min(1, max(0, topP))))
    }

    private static let key = "settings"

    /// What was kept, or the defaults where it cannot be read.
    public static func kept(in defaults: UserDefaults) -> AppSettings {
        guard let data = defaults.data(forKey: key),
            let settings = try? JSONDecoder().decode(AppSettings.self, from: data)
        else { return AppSettings() }
        return settings
    }

    public func keep(in defaults: UserDefaults) {
        if let data = try? JSONEncoder().encode(self) { defaults.set(data, forKey: Self.key) }
    }
}
