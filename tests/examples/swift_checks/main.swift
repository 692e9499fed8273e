// FILE: requests as JSON, one after the other -> their results as a JSON array. What the tests ask
// of EdgeVLM's inside, and of a session that is interrupted, rewound and unloaded.

@testable import EdgeVLM
import CoreGraphics
import CoreVideo
import Foundation
import Link
import UIKit

typealias Request = [String: Any]

func tokens(_ request: Request) throws -> Any {
    let tokenizer = try Tokenizer(file: URL(fileURLWithPath: request["file"] as! String))
    return (request["texts"] as! [String]).map { tokenizer.encode($0) }
}

/// The pieces of each list of ids, the end's last.
func pieces(_ request: Request) throws -> Any {
    let tokenizer = try Tokenizer(file: URL(fileURLWithPath: request["file"] as! String))
    return (request["ids"] as! [[Int]]).map { ids in
        var detokenizer = tokenizer.detokenizer()
        let all = ids.map { detokenizer.add($0) }
        return all + [detokenizer.finish()]
    }
}

func stopped(_ request: Request) -> Any {
    var stops = StopStrings(request["stop"] as! [String])
    let shown = (request["pieces"] as! [String]).map { stops.feed($0) }
    return shown + [stops.flush(), stops.matched ?? ""]
}

func drawn(_ request: Request) throws -> Any {
    let options = AnswerOptions(
        temperature: Float(request["temperature"] as! Double), topK: request["top_k"] as! Int,
        topP: Float(request["top_p"] as! Double), seed: UInt64(request["seed"] as! Int))
    var sampler = Sampler(options)
    let logits = (request["logits"] as! [Double]).map { Float16($0) }
    return try (0..<(request["count"] as! Int)).map { _ in try sampler.pick(logits) }
}

func upright(_ request: Request) throws -> Any {
    let rgb = (request["rgb"] as! [Int]).map { UInt8($0) }
    let (w, h) = (request["width"] as! Int, request["height"] as! Int)
    return Orientation.allCases.map { orientation in
        let raster = Raster(width: w, height: h, rgb: rgb).upright(orientation)
        return [raster.width, raster.height] + raster.rgb.map { Int($0) }
    }
}

/// A UIImage of each orientation, in the order of EXIF's numbers.
func images(_ request: Request) throws -> Any {
    let rgb = (request["rgb"] as! [Int]).map { UInt8($0) }
    let rgba = stride(from: 0, to: rgb.count, by: 3).flatMap { rgb[$0..<$0 + 3] + [255] }
    let pixels = CGImage(
        standIn: Array(rgba), width: request["width"] as! Int, height: request["height"] as! Int,
        model: .rgb)
    let orientations: [UIImage.Orientation] = [
        .up, .upMirrored, .down, .downMirrored, .leftMirrored, .right, .rightMirrored, .left,
    ]
    return try orientations.map { orientation in
        let image = UIImage(cgImage: pixels, scale: 1, orientation: orientation)
        let raster = try Picture(image).raster
        return [raster.width, raster.height] + raster.rgb.map { Int($0) }
    }
}

func inks(_ request: Request) -> Any {
    PixelReader.rgb(cmyk: (request["cmyk"] as! [Int]).map { UInt8($0) }).map { Int($0) }
}

/// A frame of a camera in each of its formats, which is one colour.
func frames(_ request: Request) throws -> Any {
    let formats = [
        kCVPixelFormatType_32BGRA, kCVPixelFormatType_420YpCbCr8BiPlanarFullRange,
        kCVPixelFormatType_420YpCbCr8BiPlanarVideoRange,
    ]
    let bytes = (request["bytes"] as! [[Int]]).map { $0.map { UInt8($0) } }
    return try zip(formats, bytes).map { format, colour in
        let buffer = CVPixelBuffer(standIn: format, 6, 4)
        if format == kCVPixelFormatType_32BGRA {
            for y in 0..<4 {
                for place in 0..<24 {
                    buffer.data.storeBytes(
                        of: colour[place % 4], toByteOffset: y * buffer.row + place, as: UInt8.self)
                }
            }
        } else {
            for y in 0..<6 {
                for x in 0..<6 {
                    let byte = y < 4 ? colour[0] : colour[1 + x % 2]
                    buffer.data.storeBytes(
                        of: byte, toByteOffset: y * buffer.row + x, as: UInt8.self)
                }
            }
        }
        return Set(try stride(from: 0, to: 72, by: 3).map { place in
            try Picture(buffer, orientation: .right).raster.rgb[place..<place + 3].map { Int($0) }
        }).map { $0 }
    }
}

/// The embeddings of a bundle's decoder, a list of values for each id.
func embedded(_ request: Request) throws -> Any {
    let folder = URL(fileURLWithPath: request["bundle"] as! String, isDirectory: true)
    let bundle = try ModelBundle(folder: folder)
    let described = try Runnable(bundle.manifest).decoder.embeddings
    let rows = try Embeddings(folder: folder, described: described).rows(request["ids"] as! [Int])
    return rows.values.map { Double($0) }
}

func forget(_ request: Request) throws -> Any {
    let folder = URL(fileURLWithPath: request["bundle"] as! String, isDirectory: true)
    try ModelBundle(folder: folder, check: .never).forget()
    return "forgotten"
}

/// A session whose task is cancelled at the first step of loading.
func cancelled(_ request: Request) async throws -> Any {
    let folder = URL(fileURLWithPath: request["bundle"] as! String, isDirectory: true)
    let bundle = try ModelBundle(folder: folder)
    let task = Task {
        try await Session(bundle: bundle) { _ in withUnsafeCurrentTask { $0?.cancel() } }
    }
    do {
        _ = try await task.value
        return "loaded"
    } catch is CancellationError {
        return "cancelled"
    }
}

/// Questions until turns have left. "fails" is the number of the question whose first prediction
/// fails at first; before "forgets" the pictures are forgotten; "undone" is asked twice.
func full(_ request: Request) async throws -> Any {
    let folder = URL(fileURLWithPath: request["bundle"] as! String, isDirectory: true)
    let picture = try Picture(contentsOf: URL(fileURLWithPath: request["picture"] as! String))
    let session = try await Session(
        bundle: ModelBundle(folder: folder), options: .init(tries: false, pictures: 0))
    var told: [[String: Any]] = []
    func ask(_ question: String, _ pictures: [Picture]) async throws {
        var entry: [String: Any] = [:]
        for try await event in session.ask(
            question, pictures: pictures,
            options: AnswerOptions(maxTokens: request["most"] as! Int))
        {
            if case .dropped(let turns) = event { entry["dropped"] = turns }
            if case .done(let report) = event {
                entry["tokens"] = report.tokens
                entry["reported"] = report.droppedTurns
                entry["reused"] = report.reusedTokens
            }
        }
        entry["turns"] = await session.turns.count
        entry["pictures"] = await session.memory.pictures
        told.append(entry)
    }
    for (number, question) in (request["questions"] as! [String]).enumerated() {
        let pictures = (request["pictured"] as! [Int]).contains(number) ? [picture] : []
        if number == request["forgets"] as? Int { await session.forgetPictures() }
        if number == request["fails"] as? Int {
            _ = Link.shared.ask(["call": "fail", "count": 1])
            do {
                try await ask(question, pictures)
            } catch {
                told.append(["error": error.localizedDescription])
            }
        }
        try await ask(question, pictures)
        if number == request["undone"] as? Int {
            await session.undo()
            try await ask(question, pictures)
        }
    }
    return told
}

/// A session's turns and calls, step by step.
func session(_ request: Request) async throws -> Any {
    let folder = URL(fileURLWithPath: request["bundle"] as! String, isDirectory: true)
    let bundle = try ModelBundle(folder: folder)
    let url = URL(fileURLWithPath: request["picture"] as! String)
    let picture = try Picture(contentsOf: url)
    let steps = Steps()
    let session = try await Session(
        bundle: bundle, options: .init(tries: request["tries"] as? Bool ?? false)
    ) { step in steps.add("\(step.done)/\(step.total)") }
    var told: [String: Any] = ["loading": steps.all]
    func ask(_ question: String, _ pictures: [Picture], _ options: AnswerOptions, until: Int = .max)
        async throws -> [String: Any]
    {
        var text = ""
        var pieces = 0
        var report: AnswerReport?
        for try await event in session.ask(question, pictures: pictures, options: options) {
            if case .text(let piece) = event {
                text += piece
                pieces += 1
                if pieces == until { break }
            }
            if case .done(let done) = event { report = done }
        }
        return [
            "text": text, "tokens": report?.tokens ?? [], "reused": report?.reusedTokens ?? -1,
            "finish": report?.finish.rawValue ?? "",
            "stages": report?.stages.map(\.stage.rawValue) ?? [],
        ]
    }
    let question = request["question"] as! String
    let greedy = AnswerOptions(maxTokens: 16)
    told["first"] = try await ask(question, [picture], greedy)
    told["memory"] = await session.memory.parts
    told["pictures"] = await session.memory.pictures
    await session.reset()
    told["again"] = try await ask(question, [picture], greedy)
    await session.reset()
    told["broken"] = try await ask(question, [picture], greedy, until: 2)
    // The second question waits until the first one's model has stopped.
    told["after"] = try await ask("What colour is it?", [], greedy)
    told["turns"] = await session.turns.map { "\($0.question)|\($0.answer)" }
    await session.undo()
    await session.undo()
    told["undone"] = try await ask(question, [picture], greedy)
    await session.reset()
    var stop = greedy
    stop.stop = [request["stop"] as! String]
    told["stopped"] = try await ask(question, [picture], stop)
    told["continued"] = try await ask("What colour is it?", [], greedy)
    await session.reset()
    told["short"] = try await ask(question, [picture], AnswerOptions(maxTokens: 2))
    told["long"] = try await ask("What colour is it?", [], greedy)
    await session.unload()
    do {
        _ = try await ask(question, [picture], greedy)
    } catch {
        told["unloaded"] = error.localizedDescription
    }
    return told
}

final class Steps: @unchecked Sendable {
    private let lock = NSLock()
    private var steps: [String] = []
    func add(_ step: String) { lock.withLock { steps.append(step) } }
    var all: [String] { lock.withLock { steps } }
}

func result(_ request: Request) async throws -> Any {
    switch request["ask"] as! String {
    case "tokens": return try tokens(request)
    case "pieces": return try pieces(request)
    case "stopped": return stopped(request)
    case "drawn": return try drawn(request)
    case "upright": return try upright(request)
    case "images": return try images(request)
    case "inks": return inks(request)
    case "frames": return try frames(request)
    case "embedded": return try embedded(request)
    case "full": return try await full(request)
    case "forget": return try forget(request)
    case "cancelled": return try await cancelled(request)
    case "session": return try await session(request)
    default: fatalError("not asked for")
    }
}

func run() async throws -> Data {
    let data = try Data(contentsOf: URL(fileURLWithPath: CommandLine.arguments[1]))
    var results: [Any] = []
    for request in try JSONSerialization.jsonObject(with: data) as! [Request] {
        do {
            results.append(try await result(request))
        } catch {
            results.append(["error": error.localizedDescription])
        }
    }
    return try JSONSerialization.data(withJSONObject: results)
}

FileHandle.standardOutput.write(try await run())
