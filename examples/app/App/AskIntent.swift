// "Ask about a picture" for Shortcuts and Siri: a picture and a question -> the answer's text.

import AppIntents
import Foundation
import UniformTypeIdentifiers

struct AskAboutPicture: AppIntent {
    static let title: LocalizedStringResource = "Ask about a picture"
    static let description = IntentDescription(
        "Asks the model on this device about a picture, in a new conversation.")
    /// Loading a model takes longer than an intent may in the background.
    static let openAppWhenRun = true

    @Parameter(title: "Picture", supportedContentTypes: [.image])
    var picture: IntentFile

    @Parameter(title: "Question", default: "What is this?")
    var question: String

    @MainActor
    func perform() async throws -> some IntentResult & ReturnsValue<String> & ProvidesDialog {
        let answer = try await Host.shared.answer(question, about: picture.data)
        return .result(value: answer, dialog: "\(answer)")
    }
}

struct EdgeShortcuts: AppShortcutsProvider {
    static var appShortcuts: [AppShortcut] {
        AppShortcut(
            intent: AskAboutPicture(), phrases: ["Ask \(.applicationName) about a picture"],
            shortTitle: "Ask about a picture", systemImageName: "photo")
    }
}
