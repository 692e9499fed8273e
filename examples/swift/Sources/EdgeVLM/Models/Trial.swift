// What was found out of a bundle's compute units on this device, under the system that it has:
// where it ran, and where the process ended. A start reads it, not to run into the same.

import Foundation

struct Trial {
    private let mark, verdict: URL
    /// Loads in a row that ended the process, until they count as the units' fault. An app is often
    /// closed while it loads for the first time, which takes minutes.
    private static let patience = 3

    /// Of a start that has not come to its end, or of one that has.
    private struct Record: Codable {
        var system = ProcessInfo.processInfo.operatingSystemVersionString
        /// nil is the manifest's own.
        var units: ComputeUnits?
        /// Loads in a row that were begun.
        var loads = 0
        /// Whether all was loaded, and ran.
        var isRunning = false
    }

    init(_ bundle: ModelBundle) {
        let key = ModelBundle.digest(
            bundle.manifest.files.sorted { $0.key < $1.key }.map(\.value).joined())
        mark = bundle.caches.appending(path: "\(key).trying")
        verdict = bundle.caches.appending(path: "\(key).units")
    }

    var files: [URL] { [mark, verdict] }

    /// What to try in turn, nil being the manifest's own units: from those on that worked last, or
    /// behind those that ended the process; the last of all in any case.
    func candidates(_ fallback: [ComputeUnits]) -> [ComputeUnits?] {
        let all = [nil] + fallback
        let left = read(mark)
        let failed = left.map { $0.isRunning || $0.loads >= Self.patience } ?? false
        let place = all.firstIndex(of: (left ?? read(verdict))?.units) ?? 0
        return Array(all.dropFirst(min(failed ? place + 1 : place, all.count - 1)))
    }

    func beginLoading(_ units: ComputeUnits?) {
        let left = read(mark)
        let before = left?.units == units ? left?.loads ?? 0 : 0
        write(Record(units: units, loads: before + 1), mark)
    }

    func beginRunning(_ units: ComputeUnits?) {
        write(Record(units: units, isRunning: true), mark)
    }

    func end() { try? FileManager.default.removeItem(at: mark) }

    func remember(_ units: ComputeUnits) { write(Record(units: units), verdict) }

    /// nil for what another version of the system left: it may run what the last one did not.
    private func read(_ url: URL) -> Record? {
        guard let data = try? Data(contentsOf: url),
            let record = try? JSONDecoder().decode(Record.self, from: data),
            record.system == Record().system
        else { return nil }
        return record
    }

    private func write(_ record: Record, _ url: URL) {
        if let data = try? JSONEncoder().encode(record) { try? data.write(to: url) }
    }
}
