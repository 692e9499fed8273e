// The pipes between the stand-ins for Apple's modules and the test, which has the interpreter and
// Pillow behind them: a JSON object a line each way; arrays are files in the folder LINK_FOLDER.

import Foundation

public final class Link: @unchecked Sendable {
    public static let shared = Link()
    private let lock = NSLock()
    private let folder = ProcessInfo.processInfo.environment["LINK_FOLDER"] ?? "."
    private lazy var out = FileHandle(forWritingAtPath: folder + "/asked")
    private lazy var back = FileHandle(forReadingAtPath: folder + "/answered")
    private var rest = Data()
    private var files = 0

    /// One question and its answer; no second question goes out before.
    public func ask(_ object: [String: Any]) -> [String: Any] {
        lock.lock()
        defer { lock.unlock() }
        guard let out, let back,
            let line = try? JSONSerialization.data(withJSONObject: object)
        else {
            fatalError("no pipes in LINK_FOLDER")
        }
        out.write(line + [10])
        while !rest.contains(10) {
            let more = back.availableData
            if more.isEmpty { fatalError("the test has gone") }
            rest.append(more)
        }
        let end = rest.firstIndex(of: 10) ?? rest.endIndex
        let answer = Data(rest[rest.startIndex..<end])
        rest = Data(rest[(end + 1)...])
        let told = try? JSONSerialization.jsonObject(with: answer)
        return told as? [String: Any] ?? [:]
    }

    /// A file for the other side, which is written over by the 500th after it.
    public func write(_ data: Data) -> String {
        lock.lock()
        files += 1
        let path = "\(folder)/in\(files % 500)"
        lock.unlock()
        try? data.write(to: URL(fileURLWithPath: path))
        return path
    }
}
