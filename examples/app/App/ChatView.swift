// Questions and answers, pictures by picker, paste and drop, and the bar of stages.

import AppLogic
import EdgeVLM
import PhotosUI
import SwiftUI
import UniformTypeIdentifiers

struct ChatView: View {
    @Bindable var host: Host
    /// What was typed stays when the system ends the app.
    @SceneStorage("question") private var question = ""
    @State private var picked: PhotosPickerItem?
    @State private var showsCamera = false
    @State private var showsSettings = false
    @State private var mistake: String?

    private var chat: Chat { host.chat }

    var body: some View {
        NavigationStack {
            VStack(spacing: 8) {
                MessagesView(messages: chat.messages)
                StatusView(host: host, mistake: mistake)
                StageBarView(bar: StageBar(chat.stages))
                presets
                entry
            }
            .padding()
            .navigationTitle("Ask about a picture")
            .toolbar { tools }
        }
        .dropDestination(for: Data.self) { items, _ in
            items.forEach { attach($0) }
            return !items.isEmpty
        }
        .onChange(of: picked) { _, item in
            guard let item else { return }
            Task {
                if let data = try? await item.loadTransferable(type: Data.self) { attach(data) }
                if picked == item { picked = nil }  // the same picture may be chosen again
            }
        }
        .onChange(of: chat.state) { before, state in
            // What fails before its first word is told too.
            guard before == .thinking || before == .answering, state == .idle,
                let last = chat.messages.last
            else { return }
            let told = last.mistake ?? last.text
            if !told.isEmpty { AccessibilityNotification.Announcement(told).post() }
        }
        .sheet(isPresented: $showsCamera) { CameraView(host: host) }
        .sheet(isPresented: $showsSettings) { SettingsView(host: host) }
    }

    private var presets: some View {
        ScrollView(.horizontal, showsIndicators: false) {
            HStack {
                ForEach(chat.settings.shownPresets, id: \.self) { text in
                    Button(text) { chat.ask(text) }.disabled(!chat.canAsk)
                }
            }
        }
    }

    private var entry: some View {
        HStack {
            PhotosPicker(selection: $picked, matching: .images) { Image(systemName: "photo") }
                .accessibilityLabel("Choose a picture")
            PasteButton(payloadType: Data.self) { items in
                Task { @MainActor in items.forEach { attach($0) } }
            }
            .labelStyle(.iconOnly)
            TextField("Question", text: $question, axis: .vertical)
                .textFieldStyle(.roundedBorder)
                .onSubmit(send)
            if chat.attached.count > 0 {
                Button("\(chat.attached.count)", systemImage: "xmark") {
                    chat.detach(chat.attached.count - 1)
                }
                .accessibilityLabel("\(chat.attached.count) pictures attached")
                .accessibilityHint("Removes the last one")
            }
            if chat.isBusy {
                Button("Stop", systemImage: "stop.fill") { Task { await chat.stop() } }
                    .labelStyle(.iconOnly)
            } else {
                Button("Ask", systemImage: "arrow.up.circle.fill", action: send)
                    .labelStyle(.iconOnly)
                    .disabled(!chat.canAsk)
            }
        }
    }

    @ToolbarContentBuilder private var tools: some ToolbarContent {
        ToolbarItem {
            Button("New conversation", systemImage: "square.and.pencil") {
                Task { await chat.newConversation() }
            }
        }
        ToolbarItem {
            Button("Camera", systemImage: "camera") { showsCamera = true }.disabled(!chat.canAsk)
                .accessibilityHint("Begins a new conversation")
        }
        ToolbarItem {
            Button("Settings", systemImage: "gear") { showsSettings = true }
        }
    }

    private func send() {
        if chat.ask(question) { question = "" }
    }

    private func attach(_ data: Data) {
        do {
            chat.attach(try Picture(data: data))
            mistake = nil
        } catch {
            mistake = error.localizedDescription
        }
    }
}

struct MessagesView: View {
    let messages: [Message]

    var body: some View {
        ScrollViewReader { proxy in
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(messages) { message in
                        VStack(alignment: .leading) {
                            Text(message.text).font(message.author == .user ? .headline : .body)
                                .textSelection(.enabled)
                            if let mistake = message.mistake {
                                Text(mistake).foregroundStyle(.red)
                            }
                            if let note = message.note { Text(note).font(.caption) }
                            if let rate = message.report?.tokensPerSecond {
                                Text("\(rate, specifier: "%.1f") tokens per second")
                                    .font(.caption).foregroundStyle(.secondary)
                            }
                        }
                        .accessibilityElement(children: .combine)
                        .opacity(message.isEarlier ? 0.6 : 1)
                        .id(message.id)
                    }
                }
            }
            .onChange(of: messages.last?.text) { proxy.scrollTo(messages.last?.id) }
        }
    }
}

struct StatusView: View {
    let host: Host
    let mistake: String?

    var body: some View {
        if let download = host.download {
            ProgressView(value: download.fraction) {
                Text("Downloading \(download.file)")
            }
        }
        if case .loading(let done, let total) = host.chat.state {
            ProgressView(value: Double(done), total: Double(max(1, total))) {
                Text("Loading the model; the first time takes minutes")
            }
        }
        if host.chat.messages.last?.isEarlier == true {
            Text("The model does not know what was said before").font(.caption)
        }
        if host.chat.state == .noModel { Text("No model: get one in the settings") }
        if let line = mistake ?? host.notice { Text(line).foregroundStyle(.orange) }
    }
}

struct StageBarView: View {
    let bar: StageBar
    @ScaledMetric private var height = 10
    private let colours: [Stage: Color] = [
        .preprocess: .gray, .vision: .blue, .tokenise: .green, .prefill: .orange,
    ]

    var body: some View {
        GeometryReader { space in
            HStack(spacing: 0) {
                ForEach(bar.parts) { part in
                    Rectangle().fill(colours[part.stage] ?? .gray)
                        .frame(width: space.size.width * part.share)
                }
            }
        }
        .frame(height: bar.parts.isEmpty ? 0 : height)
        .clipShape(.capsule)
        .accessibilityElement()
        .accessibilityLabel(bar.spoken)
    }
}
