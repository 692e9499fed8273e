"""A part of what Pillow's resize gives, without the rest: pixel for pixel, in its own arithmetic.

A long thin picture, padded to a square or enlarged to cover one, is nearly all padding or cut off
again. Here only the outputs that are wanted are computed, from the inputs that they depend on.
Source: Pillow, src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PRECISION = 22  # bits of Pillow's whole-number weights
OUTPUTS, VALUES = 8, 1 << 18  # outputs, and values of a line of inputs, that are worked on at once


def bicubic(x: np.ndarray) -> np.ndarray:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def hamming(x: np.ndarray) -> np.ndarray:
    turn = np.where(x == 0, 1.0, x) * np.pi
    high, low = (float(np.float32(constant)) for constant in (0.54, 0.46))  # as C has them
    window = np.sin(turn) / turn * (high + low * np.cos(turn))
    return np.where(x == 0, 1.0, np.where(x < 1, window, 0.0))


@dataclass(frozen=True)
class Axis:
    """A side of `total` pixels brought to `size` by a kernel of |x| that is zero from `reach` on.

    `Axis(8, 4, bicubic, 2.0).window(1)` -> (0, 7): output 1 depends on inputs 0 to 6.
    """

    total: int
    size: int
    kernel: Callable[[np.ndarray], np.ndarray]
    reach: float

    @property
    def scale(self) -> float:
        return self.total / self.size

    def window(self, output: int) -> tuple[int, int]:
        """The first input that an output depends on, and the one after the last."""
        centre, support = (output + 0.5) * self.scale, self.reach * max(self.scale, 1.0)
        low, high = int(centre - support + 0.5), int(centre + support + 0.5)
        return max(low, 0), min(high, self.total)

    def weights(self, output: int) -> np.ndarray:
        """Whole numbers, as float64, for the inputs of its window; about 2 ** PRECISION in all."""
        low, high = self.window(output)
        centre = (output + 0.5) * self.scale
        x = np.abs((np.arange(low, high) - centre + 0.5) * (1 / max(self.scale, 1.0)))
        weights = self.kernel(x)
        weights = weights / np.cumsum(weights)[-1]  # one after the other, as C adds them up
        return np.trunc(weights * (1 << PRECISION) + np.copysign(0.5, weights))

    def touched(self, lead: int, count: int) -> tuple[int, int]:
        """The outputs that depend on inputs lead .. lead + count - 1, as a range."""
        outputs = range(self.size)
        hit = [x for x in outputs if self.window(x)[0] < lead + count and self.window(x)[1] > lead]
        return hit[0], hit[-1] + 1

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
