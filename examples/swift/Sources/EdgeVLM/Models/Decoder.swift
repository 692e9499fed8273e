// Input embeddings -> what follows the last position, chunk after chunk of a prompt, then token
// after token. Keys and values are in Core ML's state ("stateful"), or in arrays that go in with
// each call and are written here afterwards ("readonly"). Masks, rotary turns, positions are made
// here.

import CoreML
import Foundation

final class LanguageDecoder {
    private(set) var offset = 0
    let geometry: DecoderGeometry
    let embeddings: Embeddings

    private let functions: [String: DecoderFunction]
    private let cacheNames: [String]
    private let logitsNames: [String]
    private let saysToken: Bool
    private var caches: [String: MLMultiArray] = [:]
    private var state: MLState?

    /// Added to the scores of what a position does not see; finite, as devices want it.
    private static let hidden: Float16 = -1e4

    init(_ parts: Runnable, packages: Packages, embeddings: Embeddings) throws {
        let entry = parts.decoder
        geometry = parts.geometry
        self.embeddings = embeddings
        functions = try geometry.functions.keys.reduce(into: [:]) { all, name in
            guard let described = entry.functions[name] else { return }
            all[name] = try DecoderFunction(model: packages[entry.package, name], described)
        }
        let decode = entry.functions[geometry.decode]
        let prefixes = [DecoderPrefix.keys.rawValue, DecoderPrefix.values.rawValue]
        cacheNames = (decode?.inputs ?? []).map(\.name).filter { name in
            prefixes.contains { name.hasPrefix($0) }
        }
        let outputs = (decode?.outputs ?? []).map(\.name)
        logitsNames = outputs.filter { $0.hasPrefix(DecoderPrefix.logits.rawValue) }
            .sorted { LanguageDecoder.number($0) < LanguageDecoder.number($1) }
        saysToken = outputs.contains(DecoderName.token.rawValue)
        try clear()
    }

    /// The part of "logits_2" behind its underscore, 0 without one.
    private static func number(_ name: String) -> Int {
        Int(name.split(separator: "_").last ?? "") ?? 0
    }

    private var isStateful: Bool { geometry.form == "stateful" }

    private func clear() throws {
        if isStateful {
            state = try function(geometry.decode).model.makeState()
            return
        }
        let shape = [geometry.layers, geometry.kvHeads, geometry.headDim, geometry.context]
        for name in cacheNames {
            caches[name] = try MLMultiArray.half(shape)
        }
    }

    /// Go on behind the first `offset` positions; no mask shows what is behind them.
    func rewind(to offset: Int) {
        self.offset = min(offset, self.offset)
    }

    /// Begin with what a bundle knows of a prompt's first ids; how many of them need not be run.
    func begin(_ known: PromptCache?, with ids: [Int]) throws -> Int {
        offset = 0
        let count = min(known?.shared(with: ids) ?? 0, geometry.context)
        guard let known, count > 0 else { return 0 }
        for name in [DecoderPrefix.keys.rawValue, DecoderPrefix.values.rawValue] {
            if let state {
                try state.withMultiArray(for: name) { try known.write(name, count, to: $0) }
            } else if let cache = caches[name] {
                try known.write(name, count, to: cache)
            }
        }
        offset = count
        return count
    }

    /// Bytes of keys and values.
    var cacheBytes: Int {
        2 * 2 * geometry.layers * geometry.kvHeads * geometry.headDim * geometry.context
    }

    private func function(_ name: String) throws -> DecoderFunction {
        guard let function = functions[name] else {
            throw EdgeVLMError("the decoder has no function \(name)", exportAgain)
        }
        return function
    }

    /// Raises EdgeVLMError where the context has no room for so many positions in all.
    func checkRoom(for count: Int) throws {
        guard count <= geometry.context else {
            throw EdgeVLMError(
                "the conversation takes \(count) positions of the context's \(geometry.context)",
                "begin a new one, or export with a larger --context")
        }
    }

    /// Each function once behind what is cached, as far as there is room, and back.
    func runEveryFunction() throws {
        let before = offset
        defer { rewind(to: before) }
        for (name, size) in geometry.functions where before + size <= geometry.context {
            let rows = try embeddings.rows([Int](repeating: 0, count: size))
            _ = try run(function(name), rows.values[...], size)
            rewind(to: before)
        }
    }

    /// The part's trial, behind nothing that is cached.
    func tryOut(_ parts: Runnable, in folder: URL) throws {
        let part = parts.decoder
        guard let trial = try TrialFile(part.trial, of: part.package, in: folder) else { return }
        let (ids, token) = try trial.tokens()
        guard ids.count <= geometry.context else { return }
        rewind(to: 0)
        defer { rewind(to: 0) }
        try trial.check(prefill(embeddings.rows(ids)), leads: token)
    }

    /// Run a prompt behind what is cached; what follows its last position.
    func prefill(_ prompt: Rows) throws -> NextToken {
        guard prompt.count > 0, prompt.width == embeddings.width else {
            throw EdgeVLMError(
                "the prompt's embeddings are \(prompt.width) wide, not \(embeddings.width)",
                exportAgain)
        }
        try checkRoom(for: offset + prompt.count)
        var first = 0
        while true {
            try Task.checkCancellation()
            let next = geometry.function(
                remaining: prompt.count - first, room: geometry.context - offset)
            let count = min(next.size, prompt.count - first)
            let part = prompt.values[first * prompt.width..<(first + count) * prompt.width]
            let said = try run(function(next.name), part, count)
            first += count
            if first == prompt.count { return said }
        }
    }

    /// What follows one more token.
    func step(_ token: Int) throws -> NextToken {
        guard hasRoom else {
            throw EdgeVLMError(
                "the context of \(geometry.context) is full",
                "begin a new conversation, or export with a larger --context")
        }
        let row = try embeddings.rows([token]).values[...]
        return try run(function(geometry.decode), row, 1)
    }

    /// Whether one more token fits.
    var hasRoom: Bool { offset < geometry.context }

    private func run(
        _ function: DecoderFunction, _ values: ArraySlice<Float16>, _ count: Int
    ) throws -> NextToken {
        write(values, count, function)
        var named = caches.mapValues { MLFeatureValue(multiArray: $0) }
        for (name, array) in function.inputs {
            named[name.rawValue] = MLFeatureValue(multiArray: array)
        }
        if isStateful {
            let position = try MLMultiArray.single(offset)
            named[DecoderName.position.rawValue] = MLFeatureValue(multiArray: position)
        }
        let outputs = try function.predict(MLDictionaryFeatureProvider(dictionary: named), state)
        for (name, cache) in caches {
            let new = try Self.array(outputs, DecoderPrefix.new.rawValue + name)
            try cache.write(new, count: count, at: offset)
        }
        offset += count
        let name = DecoderName.token.rawValue
        let token = try saysToken ? Self.array(outputs, name)[0].intValue : nil
        let logits = try logitsNames.map { (name: $0, array: try Self.array(outputs, $0)) }
        return NextToken(likeliest: token, parts: logits)
    }

    private static func array(
        _ outputs: MLFeatureProvider, _ name: String
    ) throws -> MLMultiArray {
        guard let array = outputs.featureValue(for: name)?.multiArrayValue else {
            throw EdgeVLMError("the decoder gave no \(name)", exportAgain)
        }
        return array
    }

    /// All that goes in but the caches and the position.
    private func write(_ values: ArraySlice<Float16>, _ count: Int, _ function: DecoderFunction) {
        writeEmbeddings(values, count, function.inputs[.embeddings])
        writeMask(function.inputs[.mask])
        writeTurns(function.inputs[.cos]) { Foundation.cos($0) }
        writeTurns(function.inputs[.sin]) { Foundation.sin($0) }
        // [1, 1, size], or [1, size, 1]
        function.inputs[.pick]?.writeRows { row, out in
            for index in out.indices { out[index] = row + index == count - 1 ? 1 : 0 }
        }
    }

    /// Rows [1, size, D], or channels first [1, D, 1, size]; zeros behind `count` positions.
    private func writeEmbeddings(
        _ values: ArraySlice<Float16>, _ count: Int, _ array: MLMultiArray?
    ) {
        let width = embeddings.width
        let first = values.startIndex
        array?.writeRows { [isStateful] row, out in
            if isStateful {
                let start = first + row * width
                if row < count {
                    _ = out.update(from: values[start..<start + width])
                } else {
                    out.update(repeating: 0)
                }
                return
            }
            for position in out.indices {
                out[position] = position < count ? values[first + position * width + row] : 0
            }
        }
    }

    /// 0 where a position sees a key of the cache, else `hidden`.
    ///
    /// Stateful [1, 1, size, context], the new positions in place; read-only
    /// [1, 1, 1, context], the cache before them.
    private func writeMask(_ array: MLMultiArray?) {
        array?.writeRows { [isStateful, offset] row, out in
            let seen = isStateful ? offset + row + 1 : offset
            for key in out.indices { out[key] = key < seen ? 0 : Self.hidden }
        }
    }

    /// Cosines or sines [1, 1, head_dim, size] of the next positions; both halves are alike.
    private func writeTurns(_ array: MLMultiArray?, _ turn: (Double) -> Double) {
        let periods = geometry.periods
        array?.writeRows { [offset] row, out in
            for position in out.indices {
                let angle = Double(offset + position) / periods[row % periods.count]
                out[position] = Float16(turn(angle))
            }
        }
    }
}

/// What the decoder says of the position behind the last. To be read before it runs again, which
/// writes the same arrays anew.
struct NextToken {
    /// Of the largest logit, where the package tells it: the logits need not be copied then.
    let likeliest: Int?
    private let parts: [(name: String, array: MLMultiArray)]

    init(likeliest: Int?, parts: [(name: String, array: MLMultiArray)]) {
        self.likeliest = likeliest
        self.parts = parts
    }

    func logits() throws -> [Float16] { try parts.flatMap { try $0.array.halves($0.name) } }

    /// One of the logits; nil where there is none of this number.
    func logit(_ token: Int) throws -> Float16? {
        var left = token
        for (name, array) in parts where left >= 0 {
            let count = array.count
            if left < count { return try array.half(at: left, name) }
            left -= count
        }
        return nil
    }
}
