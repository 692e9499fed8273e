// The camera with captions that go on and on, and how many a second.

import AVFoundation
import AppLogic
import EdgeVLM
import SwiftUI

struct CameraView: View {
    let host: Host
    @Environment(\.dismiss) private var dismiss
    @State private var caption: Captions<Picture>.Caption?
    @State private var mistake: String?
    @State private var camera = Camera()

    var body: some View {
        VStack {
            CameraPreview(session: camera.session)
                .accessibilityLabel("What the camera sees")
            Text(caption?.text ?? "Looking …").font(.title2).padding()
                .accessibilityAddTraits(.updatesFrequently)
            if let caption {
                Text("\(caption.rate, specifier: "%.1f") captions per second")
                    .font(.caption)
            }
            if let mistake { Text(mistake).foregroundStyle(.red) }
            Text("The camera has begun a new conversation")
                .font(.caption).foregroundStyle(.secondary)
            Button("Done") { dismiss() }
        }
        .task { await watch() }
    }

    /// Until the view goes. Captions are of the chat's own model, whose conversation they end.
    private func watch() async {
        guard let model = host.chat.model else { return }
        await host.chat.newConversation()
        let question = host.chat.settings.cameraQuestion
        let start = ContinuousClock.now
        let captions = Captions<Picture>(
            now: { (ContinuousClock.now - start) / .seconds(1) },
            describe: { try await AppLogic.caption($0, by: model, question: question) },
            tell: { told in await MainActor.run { caption = told } })
        do {
            let pictures = try await camera.pictures()
            for try await picture in pictures {
                await captions.slow(to: host.captionInterval)
                await captions.take(picture)
                mistake = await captions.mistake
            }
        } catch {
            mistake = error.localizedDescription
        }
        await captions.stop()
        await model.reset()
    }
}

/// The back camera, or the one there is.
final class Camera: NSObject, AVCaptureVideoDataOutputSampleBufferDelegate, @unchecked Sendable {
    let session = AVCaptureSession()
    private let queue = DispatchQueue(label: "camera")
    private let output = AVCaptureVideoDataOutput()
    private var put: AsyncThrowingStream<Picture, Error>.Continuation?
    #if os(iOS)
    private var rotation: AVCaptureDevice.RotationCoordinator?
    private var turning: NSKeyValueObservation?
    #endif

    func pictures() async throws -> AsyncThrowingStream<Picture, Error> {
        guard await AVCaptureDevice.requestAccess(for: .video) else {
            throw EdgeVLMError("the camera may not be used", "allow it in the system's settings")
        }
        guard let device = AVCaptureDevice.default(for: .video) else {
            throw EdgeVLMError("there is no camera", "choose a picture instead")
        }
        let input = try AVCaptureDeviceInput(device: device)
        output.videoSettings = [
            kCVPixelBufferPixelFormatTypeKey as String: kCVPixelFormatType_32BGRA
        ]
        output.alwaysDiscardsLateVideoFrames = true
        output.setSampleBufferDelegate(self, queue: queue)
        session.beginConfiguration()
        session.sessionPreset = .vga640x480
        if session.canAddInput(input) { session.addInput(input) }
        if session.canAddOutput(output) { session.addOutput(output) }
        session.commitConfiguration()
        #if os(iOS)
        follow(device)
        #endif
        let (stream, put) = AsyncThrowingStream<Picture, Error>.makeStream(
            bufferingPolicy: .bufferingNewest(1))
        put.onTermination = { [self] _ in queue.async { self.session.stopRunning() } }
        queue.async {
            self.put = put
            self.session.startRunning()
        }
        return stream
    }

    #if os(iOS)
    /// Frames are upright however the device is held; a Mac's are as they come.
    private func follow(_ device: AVCaptureDevice) {
        let rotation = AVCaptureDevice.RotationCoordinator(device: device, previewLayer: nil)
        turn(rotation.videoRotationAngleForHorizonLevelCapture)
        turning = rotation.observe(\.videoRotationAngleForHorizonLevelCapture, options: .new) {
            [weak self] _, change in
            if let angle = change.newValue { self?.turn(angle) }
        }
        self.rotation = rotation
    }

    private func turn(_ angle: CGFloat) {
        guard let connection = output.connection(with: .video),
            connection.isVideoRotationAngleSupported(angle)
        else { return }
        connection.videoRotationAngle = angle
    }
    #endif

    func captureOutput(
        _ output: AVCaptureOutput, didOutput sample: CMSampleBuffer,
        from connection: AVCaptureConnection
    ) {
        guard let buffer = CMSampleBufferGetImageBuffer(sample) else { return }
        if let picture = try? Picture(buffer) { put?.yield(picture) }
    }
}
