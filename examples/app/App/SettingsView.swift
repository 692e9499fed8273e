// Models, and what answers are made with.

import AppLogic
import SwiftUI

struct SettingsView: View {
    @Bindable var host: Host
    @Environment(\.dismiss) private var dismiss
    @State private var address = ""

    private var settings: Binding<Settings> {
        Binding(get: { host.chat.settings }, set: { host.chat.settings = $0 })
    }

    var body: some View {
        NavigationStack {
            Form {
                Section("Model") {
                    ForEach(host.library?.entries ?? []) { entry in
                        Button(entry.name) { Task { await host.load(entry.name) } }
                            .swipeActions {
                                Button("Delete", role: .destructive) {
                                    try? host.library?.remove(entry)
                                }
                            }
                    }
                    TextField("https://… of a bundle's folder", text: $address)
                    Button("Download") { Task { await host.fetch(address) } }
                        .disabled(host.isFetching)
                    Button("Unload") { Task { await host.chat.unload() } }
                }
                Section("Answers") {
                    Stepper(
                        "At most \(settings.wrappedValue.maxTokens) tokens",
                        value: settings.maxTokens, in: 10...1000, step: 10)
                    Slider(value: settings.temperature, in: 0...1) { Text("Temperature") }
                    Slider(value: settings.topP, in: 0.1...1) { Text("Top-p") }
                    TextField("Instructions", text: settings.system, axis: .vertical)
                    TextField("The camera's question", text: settings.cameraQuestion)
                }
                Section("Questions a tap away, one a line") {
                    TextField("Questions", text: settings.presetLines, axis: .vertical)
                }
            }
            .navigationTitle("Settings")
            .toolbar {
                ToolbarItem {
                    Button("Done") {
                        host.chat.settings.keep(in: .standard)
                        dismiss()
                    }
                }
            }
        }
    }
}
