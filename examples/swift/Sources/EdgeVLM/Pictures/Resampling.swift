// Pillow's bicubic resize, in its own whole-number arithmetic: rows first, then columns, rounded to
// 8 bits in between. Pixel for pixel what the Python preprocessing gives.
// Source: Pillow, src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc).

import Foundation

/// RGB pixels, row after row.
struct Raster: Equatable, Sendable {
    let width: Int
    let height: Int
    var rgb: [UInt8]

    init(width: Int, height: Int, rgb: [UInt8]) {
        self.width = width
        self.height = height
        self.rgb = rgb
    }

    init(width: Int, height: Int, fill: [UInt8]) {
        let black = [UInt8](repeating: 0, count: 3 * width * height)
        self.init(width: width, height: height, rgb: black)
        for place in rgb.indices { rgb[place] = fill[place % 3] }
    }

    /// Put another raster here, its corner at (x, y).
    mutating func paste(_ other: Raster, x: Int, y: Int) {
        for row in 0..<other.height {
            let from = 3 * row * other.width
            let to = 3 * ((y + row) * width + x)
            rgb.replaceSubrange(
                to..<to + 3 * other.width, with: other.rgb[from..<from + 3 * other.width])
        }
    }

    func rows(_ range: Range<Int>) -> Raster {
        let part = rgb[3 * range.lowerBound * width..<3 * range.upperBound * width]
        return Raster(width: width, height: range.count, rgb: [UInt8](part))
    }

    func crop(x: Int, y: Int, width: Int, height: Int) -> Raster {
        var part: [UInt8] = []
        part.reserveCapacity(3 * width * height)
        for row in y..<y + height {
            part += rgb[3 * (row * self.width + x)..<3 * (row * self.width + x + width)]
        }
        return Raster(width: width, height: height, rgb: part)
    }
}

/// The whole-number weights of one side of `total` pixels brought to `size`.
struct ResampleAxis {
    static let precision = 22
    /// First input and number of inputs of each output; `weights` has `taps` places for each.
    let first: [Int]
    let count: [Int]
    let weights: [Int32]
    let taps: Int

    init(total: Int, size: Int) {
        let scale = Double(total) / Double(size)
        let wide = max(scale, 1)
        let support = 2 * wide
        let taps = Int(support.rounded(.up)) * 2 + 1
        var first: [Int] = []
        var count: [Int] = []
        var weights = [Int32](repeating: 0, count: size * taps)
        var line = [Double](repeating: 0, count: taps)
        for output in 0..<size {
            let centre = (Double(output) + 0.5) * scale
            let low = max(Int(centre - support + 0.5), 0)
            let high = min(Int(centre + support + 0.5), total)
            var sum = 0.0
            for index in 0..<high - low {
                let weight = Self.bicubic((Double(index + low) - centre + 0.5) * (1 / wide))
                line[index] = weight
                sum += weight
            }
            for index in 0..<high - low {
                let weight = line[index] / sum * Double(1 << Self.precision)
                weights[output * taps + index] = Int32(weight + (weight < 0 ? -0.5 : 0.5))
            }
            first.append(low)
            count.append(high - low)
        }
        self.first = first
        self.count = count
        self.weights = weights
        self.taps = taps
    }

    private static func bicubic(_ distance: Double) -> Double {
        let x = abs(distance)
        if x < 1 { return (1.5 * x - 2.5) * x * x + 1 }
        if x < 2 { return (((x - 5) * x + 8) * x - 4) * -0.5 }
        return 0
    }
}

extension Raster {
    func resized(_ width: Int, _ height: Int) -> Raster {
        let narrow = width == self.width ? self : resizedAcross(width)
        return height == self.height ? narrow : narrow.resizedDown(height)
    }

    private func resizedAcross(_ size: Int) -> Raster {
        let axis = ResampleAxis(total: width, size: size)
        var out = [UInt8](repeating: 0, count: 3 * size * height)
        out.withUnsafeMutableBufferPointer { out in
            rgb.withUnsafeBufferPointer { source in
                axis.weights.withUnsafeBufferPointer { weights in
                    for row in 0..<height {
                        for output in 0..<size {
                            var place = 3 * (row * width + axis.first[output])
                            var red: Int32 = 1 << (ResampleAxis.precision - 1)
                            var green = red
                            var blue = red
                            let at = output * axis.taps
                            for tap in at..<at + axis.count[output] {
                                let weight = weights[tap]
                                red &+= Int32(source[place]) &* weight
                                green &+= Int32(source[place + 1]) &* weight
                                blue &+= Int32(source[place + 2]) &* weight
                                place += 3
                            }
                            let to = 3 * (row * size + output)
                            out[to] = Self.level(red)
                            out[to + 1] = Self.level(green)
                            out[to + 2] = Self.level(blue)
                        }
                    }
                }
            }
        }
        return Raster(width: size, height: height, rgb: out)
    }

    private func resizedDown(_ size: Int) -> Raster {
        let axis = ResampleAxis(total: height, size: size)
        let line = 3 * width
        var out = [UInt8](repeating: 0, count: line * size)
        var sums = [Int32](repeating: 0, count: line)
        out.withUnsafeMutableBufferPointer { out in
            rgb.withUnsafeBufferPointer { source in
                sums.withUnsafeMutableBufferPointer { sums in
                    for output in 0..<size {
                        sums.update(repeating: 1 << (ResampleAxis.precision - 1))
                        for tap in 0..<axis.count[output] {
                            let weight = axis.weights[output * axis.taps + tap]
                            let from = (axis.first[output] + tap) * line
                            for place in 0..<line {
                                sums[place] &+= Int32(source[from + place]) &* weight
                            }
                        }
                        for place in 0..<line {
                            out[output * line + place] = Self.level(sums[place])
                        }
                    }
                }
            }
        }
        return Raster(width: width, height: size, rgb: out)
    }

    private static func level(_ sum: Int32) -> UInt8 {
        UInt8(clamping: sum >> Int32(ResampleAxis.precision))
    }
}

extension Raster {
    /// Rows resized at a time when padding, so that the padded canvas is never there as a whole.
    private static let strip = 256

    /// A picture in the size that a model takes, as mlx_vlm_edge/picture/image.py's `fit`.
    ///
    /// pad: centred on a canvas of the size's shape, then resized. center_crop: resized to cover
    /// the size, then cropped. stretch: resized without keeping the shape.
    func fitted(_ w: Int, _ h: Int, strategy: String, fill: [UInt8]) throws -> Raster {
        switch strategy {
        case "stretch": return resized(w, h)
        case "pad": return padded(w, h, fill)
        case "center_crop":
            let wide = width * h > height * w
            let across = wide ? Int(Double(h * width) / Double(height)) : w
            let down = wide ? h : Int(Double(w * height) / Double(width))
            return resized(across, down)
                .crop(x: (across - w) / 2, y: (down - h) / 2, width: w, height: h)
        default:
            throw EdgeVLMError(
                "manifest.json: image strategy \(strategy) is not known", "update EdgeVLM")
        }
    }

    private func padded(_ w: Int, _ h: Int, _ fill: [UInt8]) -> Raster {
        let canvasWidth = max(width, (height * w + h - 1) / h)
        let canvasHeight = max(height, (width * h + w - 1) / w)
        let left = (canvasWidth - width) / 2
        let top = (canvasHeight - height) / 2
        var narrow = Raster(width: w, height: canvasHeight, fill: fill)
        if canvasWidth == width {
            narrow.paste(resized(w, height), x: 0, y: top)
            return narrow.resized(w, h)
        }
        for start in stride(from: 0, to: height, by: Self.strip) {
            let rows = rows(start..<min(start + Self.strip, height))
            var wide = Raster(width: canvasWidth, height: rows.height, fill: fill)
            wide.paste(rows, x: left, y: 0)
            narrow.paste(wide.resized(w, rows.height), x: 0, y: top + start)
        }
        return narrow.resized(w, h)
    }
}
