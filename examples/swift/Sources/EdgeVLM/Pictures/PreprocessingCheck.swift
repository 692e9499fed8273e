// The test vectors that a bundle carries -> how far this device's pictures are from Python's.
// Nothing but Apple's own decoding can make them differ, so that an app may check it once.

import Foundation

/// The largest difference of any colour of any pixel, in 255ths, by what was read: a picture's
/// size, with the one that it was brought to behind it where that is a further one, or a file.
public struct PreprocessingCheck: Sendable {
    public let differences: [String: Int]

    public var largest: Int { differences.values.max() ?? 0 }

    private struct Vectors: Decodable {
        let format: Int
        let resized: [Resized]
        let files: [File]
        /// nil in bundles from before.
        let sizes: [Size]?
    }

    /// What pictures become in a further one of the bundle's sizes.
    private struct Size: Decodable {
        let width, height: Int
        let resized: [Resized]
    }

    /// samples: x, y, red, green, blue.
    private struct Resized: Decodable {
        let width, height: Int
        let samples: [[Int]]
    }

    private struct File: Decodable {
        let name: String
        let file: Data
        let width, height: Int
        let rgb: Data
    }

    /// Raises EdgeVLMError for a bundle without vectors, or of another size.
    public init(_ bundle: ModelBundle) throws {
        guard let wanted = bundle.manifest.preprocessing else {
            throw EdgeVLMError("the bundle takes no pictures", "export it with --part all")
        }
        let url = bundle.folder.appending(path: wanted.vectors)
        guard let data = try? Data(contentsOf: url),
            let vectors = try? JSONDecoder().decode(Vectors.self, from: data), vectors.format == 1
        else {
            throw EdgeVLMError("\(wanted.vectors): cannot be read", exportAgain)
        }
        var differences: [String: Int] = [:]
        for entry in vectors.resized {
            differences["\(entry.width) x \(entry.height)"] = try Self.difference(entry, wanted)
        }
        for size in vectors.sizes ?? [] {
            let sized = wanted.sized(size.width, size.height)
            for entry in size.resized {
                let name = "\(entry.width) x \(entry.height) to \(size.width) x \(size.height)"
                differences[name] = try Self.difference(entry, sized)
            }
        }
        for entry in vectors.files {
            let raster = try Picture(data: entry.file).raster
            let same = raster.width == entry.width && raster.height == entry.height
            let pairs = zip(raster.rgb, entry.rgb)
            let worst = pairs.map { abs(Int($0) - Int($1)) }.max() ?? 255
            differences[entry.name] = same ? worst : 255
        }
        self.differences = differences
    }

    /// Of a computed picture in the size that is wanted, the largest at its samples.
    private static func difference(
        _ entry: Resized, _ wanted: Manifest.Preprocessing
    ) throws -> Int {
        let fitted = try source(entry.width, entry.height).fitted(to: wanted)
        return entry.samples.reduce(0) { worst, sample in
            let place = 3 * (sample[1] * fitted.width + sample[0])
            return (0..<3).reduce(worst) { worst, channel in
                max(worst, abs(Int(fitted.rgb[place + channel]) - sample[2 + channel]))
            }
        }
    }

    /// The computed picture of a size, as the exporter's vectors.py has it.
    static func source(_ width: Int, _ height: Int) -> Raster {
        var rgb: [UInt8] = []
        rgb.reserveCapacity(3 * width * height)
        for y in 0..<height {
            for x in 0..<width {
                let checks = (x / 9 + y / 5) % 2 * 90
                for c in 0..<3 {
                    let value = x * x * (c + 1) / 7 + y * (31 - 10 * c) + checks
                    rgb.append(UInt8(value % 256))
                }
            }
        }
        return Raster(width: width, height: height, rgb: rgb)
    }
}

extension Manifest.Preprocessing {
    /// The same for another size of pictures.
    func sized(_ width: Int, _ height: Int) -> Self {
        Self(
            strategy: strategy, width: width, height: height, fill: fill, resample: resample,
            color: color, range: range, folded: folded, vectors: vectors)
    }

    /// Raises EdgeVLMError for what `Raster.fitted` does not do.
    func check() throws {
        guard color == "RGB", fill.count == 3, resample == "bicubic", width > 0, height > 0 else {
            throw EdgeVLMError(
                "manifest.json: its preprocessing is not bicubic RGB", "update EdgeVLM")
        }
    }
}

extension Raster {
    /// In the size that a manifest asks for.
    func fitted(to wanted: Manifest.Preprocessing) throws -> Raster {
        try wanted.check()
        let fill = wanted.fill.map { UInt8(clamping: $0) }
        return try fitted(wanted.width, wanted.height, strategy: wanted.strategy, fill: fill)
    }
}
