"""A side of a picture -> the weights of Pillow's resize, in its own whole numbers.

By them a device resizes (`device.py`), and the host computes a part of a resize without the rest: a
long thin picture, padded to a square or enlarged to cover one, is nearly all padding or cut off
again.
Source: Pillow, src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PRECISION = 22  # bits of Pillow's whole-number weights
OUTPUTS, VALUES = 8, 1 << 18  # outputs, and values of a line of inputs, that are worked on at once


def _sin(x: np.ndarray) -> np.ndarray:
    """Of the C library, as Pillow's: numpy has its own, which may end in another bit."""
    return np.fromiter(map(math.sin, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def _cos(x: np.ndarray) -> np.ndarray:
    return np.fromiter(map(math.cos, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def bilinear(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1, 1.0 - x, 0.0)


def bicubic(x: np.ndarray) -> np.ndarray:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def hamming(x: np.ndarray) -> np.ndarray:
    turn = np.where(x == 0, 1.0, x) * np.pi
    high, low = (float(np.float32(constant)) for constant in (0.54, 0.46))  # as C has them
    window = _sin(turn) / turn * (high + low * _cos(turn))
    return np.where(x == 0, 1.0, np.where(x < 1, window, 0.0))


def lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3, _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    turn = np.where(x == 0, 1.0, x) * np.pi
    return np.where(x == 0, 1.0, _sin(turn) / turn)


Kernel = Callable[[np.ndarray], np.ndarray]
# By Pillow's numbers of its filters: the kernel of |x|, and where it ends.
FILTERS: dict[int, tuple[Kernel, float]] = {
    1: (lanczos, 3.0),
    2: (bilinear, 1.0),
    3: (bicubic, 2.0),
    5: (hamming, 1.0),
}


@dataclass(frozen=True)
class Axis:
    """A side of `total` pixels brought to `size` by a kernel of |x| that is zero from `reach` on.

    `Axis(8, 4, bicubic, 2.0).window(1)` -> (0, 7): output 1 depends on inputs 0 to 6.
    """

    total: int
    size: int
    kernel: Kernel
    reach: float

    @property
    def scale(self) -> float:
        return self.total / self.size

    def _windows(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centre, support = (outputs + 0.5) * self.scale, self.reach * max(self.scale, 1.0)
        low, high = (centre - support + 0.5).astype(int), (centre + support + 0.5).astype(int)
        return np.maximum(low, 0), np.minimum(high, self.total)

    def window(self, output: int) -> tuple[int, int]:
        """The first input that an output depends on, and the one after the last."""
        low, high = self._windows(np.array([output]))
        return int(low[0]), int(high[0])

    def taps(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Of outputs first .. last - 1, the first input of each, int [n], and the weights, int
        [n, K], of that one and the ones after it; about 2 ** PRECISION in all."""
        outputs = np.arange(first, last)
        low, high = self._windows(outputs)
        inputs = np.arange(int((high - low).max()))
        centre = (outputs + 0.5) * self.scale
        away = (inputs + low[:, None]) - centre[:, None] + 0.5
        weights = self.kernel(np.abs(away * (1.0 / max(self.scale, 1.0))))
        weights[inputs >= (high - low)[:, None]] = 0.0
        sums = np.cumsum(weights, axis=1)[:, -1:]  # one after the other, as C adds them up
        weights = np.divide(weights, sums, out=weights, where=sums != 0)
        return low, np.trunc(weights * (1 << PRECISION) + np.copysign(0.5, weights)).astype(int)

    def weights(self, output: int) -> np.ndarray:
        """Whole numbers for the inputs of an output's window."""
        return self.taps(output, output + 1)[1][0]

    def touched(self, lead: int, count: int) -> tuple[int, int]:
        """The outputs that depend on inputs lead .. lead + count - 1, as a range."""
        low, high = self._windows(np.arange(self.size))
        hit = np.nonzero((low < lead + count) & (high > lead))[0]
        return int(hit[0]), int(hit[-1]) + 1

    def resized(
        self, lines: np.ndarray, lead: int, first: int, last: int, fill: tuple[int, int, int]
    ) -> np.ndarray:
        """Outputs first .. last - 1, uint8 [last - first, M, 3].

        lines: uint8 [N, M, 3], inputs lead, lead + 1, ...; those before and after them are `fill`.
        """
        count, width, _ = lines.shape
        result = np.empty((last - first, width, 3), np.uint8)
        step = max(1, VALUES // max(1, min(count, int(4 * self.scale * OUTPUTS) + OUTPUTS)))
        for start in range(first, last, OUTPUTS):
            outputs = range(start, min(start + OUTPUTS, last))
            low = min(max(self.window(outputs[0])[0] - lead, 0), count)
            high = max(min(self.window(outputs[-1])[1] - lead, count), low)
            matrix = np.zeros((len(outputs), high - low))
            around = np.empty(len(outputs))  # the weight of all that is fill
            for row, output in enumerate(outputs):
                weights, begin = self.weights(output), self.window(output)[0] - lead - low
                inside = weights[max(-begin, 0) : max(high - low - begin, 0)]
                matrix[row, max(begin, 0) : max(begin, 0) + len(inside)] = inside
                around[row] = weights.sum() - inside.sum()
            base = around[:, None, None] * np.array(fill, float) + (1 << (PRECISION - 1))
            for at in range(0, width, step):
                part = lines[low:high, at : at + step].astype(np.float64)
                sums = np.tensordot(matrix, part, 1) + base  # below 2 ** 53: exact
                levels = np.floor(sums / (1 << PRECISION)).clip(0, 255)
                result[start - first : outputs[-1] + 1 - first, at : at + step] = levels
        return result
