// Models, and what answers are made with.

import AppLogic
import SwiftUI

struct SettingsView: View {
    @Bindable var host: Host
    @Environment(\.dismiss) private var dismiss
    @State private var address = ""

    private var settings: Binding<AppSettings> {
        Binding(get: { host.chat.settings }, set: { host.chat.settings = $0 })
    }

    var body: some View {
        NavigationStack {
            Form {
                Section("Model") {
                    ForEach(host.entries) { entry in
                        Button(entry.name) { Task { await host.load(entry.name) } }
                            .disabled(host.chat.isLoading)
                            .swipeActions { delete(entry) }
                            .contextMenu { delete(entry) }  // on a Mac, too
                    }
                    TextField("https://… of a bundle's folder", text: $address)
                    Button("Download") { Task { await host.fetch(address) } }
                        .disabled(host.isFetching)
                    Button(host.chat.isLoading ? "Stop loading" : "Unload") {
                        Task { await host.chat.unload() }
                    }
                }
                Section("Answers") {
                    Stepper(
                        "At most \(settings.wrappedValue.maxTokens) tokens",
                        value: settings.maxTokens, in: 10...1000, step: 10)
                    Slider(value: settings.temperature, in: 0...1) { Text("Temperature") }
                    Slider(value: settings.topP, in: 0.1...1) { Text("Top-p") }
                    TextField("Instructions", text: settings.system, axis: .vertical)
                    Text("With other instructions the model is loaded again").font(.caption)
                    TextField("The camera's question", text: settings.cameraQuestion)
                }
                Section("Questions a tap away, one a line") {
                    TextField("Questions", text: settings.presetLines, axis: .vertical)
                }
            }
            .navigationTitle("Settings")
            .toolbar {
                ToolbarItem { Button("Done") { dismiss() } }
            }
        }
        .onDisappear { Task { await host.settle() } }
    }

    private func delete(_ entry: Library.Entry) -> some View {
        Button("Delete", role: .destructive) { Task { await host.remove(entry) } }
    }
}
