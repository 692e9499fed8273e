"""Bytes and whole-number weights -> bytes: a filtered resize along one axis, exact on any device.

Each output is a sum over a window of the inputs, so a run of outputs is a small matrix times the
rows of its windows. Weights have up to 23 bits; they are split into two parts so small that float32
holds every sum of products exactly, in any order, also where matmuls read float32 as TF32.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

TOGETHER = 32  # outputs of one matrix; more of them waste more zeros, fewer read inputs more often
DEEP = 512  # inputs that one matmul adds up
EXACT = 1 << 24  # float32 holds all whole numbers to here
SIGNIFICANT = 11  # bits of TF32's numbers
CHUNK = 1 << 25  # elements of the inputs that lie in float32 at a time: 128 MB


@dataclass(frozen=True, eq=False)
class Bands:
    """A resize of one axis, laid out for the device by `bands`.

    outputs: how many. index: int32 [tiles, width], the inputs that each run of outputs looks at.
    matrices: float32 [tiles, 2 * TOGETHER, width], high and low parts of the weights. step: what
    the high parts count. around: int32 [tiles * TOGETHER], what is added to every sum.
    """

    outputs: int
    index: mx.array
    matrices: mx.array
    step: int
    around: mx.array
    precision: int


def bands(starts: np.ndarray, weights: np.ndarray, count: int, outside: np.ndarray, precision: int
          ) -> Bands:  # fmt: skip
    """starts int [n], weights int [n, K] of inputs starts .. starts + K - 1, of which there are
    `count` (weights of others are zero); outside: int [n], the weight of what is not among them;
    precision: bits that are shifted out at the end."""
    n = len(starts)
    tiles = -(-n // TOGETHER)
    used = weights != 0
    first = starts + np.where(used.any(1), used.argmax(1), 0)
    last = starts + np.where(used.any(1), used.shape[1] - used[:, ::-1].argmax(1), 0)
    edges = np.arange(tiles) * TOGETHER
    none = ~used.any(1)
    low = np.minimum.reduceat(np.where(none, count, first), edges).clip(0, count - 1)
    high = np.maximum.reduceat(np.where(none, 0, last), edges)
    width = max(1, int((high - low).max()))
    whole = np.zeros((tiles * TOGETHER, width), np.int64)
    rows, taps = np.nonzero(used)
    whole[rows, starts[rows] + taps - low[rows // TOGETHER]] = weights[rows, taps]
    bits = _low_bits(whole)
    highs = (whole + (1 << bits >> 1)) >> bits
    parts = np.stack([highs, whole - (highs << bits)]).reshape(2, tiles, TOGETHER, width)
    around = np.zeros(tiles * TOGETHER, np.int32)
    around[:n] = outside
    index = np.minimum(low[:, None] + np.arange(width), count - 1)
    return Bands(
        n,
        mx.array(index.astype(np.int32)),
        mx.array(parts.swapaxes(0, 1).reshape(tiles, -1, width).astype(np.float32)),
        1 << bits,
        mx.array(around),
        precision,
    )


def _low_bits(whole: np.ndarray) -> int:
    """How many bits the low parts get, so that all sums of both parts stay exact.

    Raises ValueError where there is no such number, as for weights that are no filter's.
    """
    for bits in range(SIGNIFICANT + 1, 0, -1):
        highs = (whole + (1 << bits >> 1)) >> bits
        lows = np.abs(whole - (highs << bits))
        highs = np.abs(highs)
        narrow = max(int(highs.max()), int(lows.max())) <= 1 << SIGNIFICANT
        deep = [part[:, at : at + DEEP].sum(1).max() for part in (highs, lows)
                for at in range(0, whole.shape[1], DEEP)]  # fmt: skip
        if narrow and 255 * int(max(deep)) < EXACT:
            return bits
    raise ValueError("these weights cannot be split so that float32 adds their products exactly")


def resampled(x: mx.array, bands: Bands, fill: mx.array) -> mx.array:
    """uint8 [N, M, 3] -> uint8 [n, M, 3]. fill: int32 [3], the colour of what is outside."""
    tiles, width = bands.index.shape
    columns = x.shape[1]
    flat = x.reshape(x.shape[0], -1)
    some = max(1, CHUNK // (width * max(1, flat.shape[1])))
    done = []
    for at in range(0, tiles, some):
        part = slice(at, at + some)
        sums = _sums(flat, bands.index[part], bands.matrices[part], bands.step)
        around = bands.around[at * TOGETHER : (at + some) * TOGETHER]
        sums = sums.reshape(-1, columns, 3) + around[:, None, None] * fill
        done.append(_levels(sums, bands.precision))
    y = done[0] if len(done) == 1 else mx.concatenate(done)
    return y[: bands.outputs]


def _sums(x: mx.array, index: mx.array, matrices: mx.array, step: int) -> mx.array:
    """int32 [tiles, TOGETHER, M * 3] of x uint8 [N, M * 3]."""
    total = mx.array(0, mx.int32)
    for at in range(0, index.shape[1], DEEP):
        inputs = x[index[:, at : at + DEEP]].astype(mx.float32)  # [tiles, width, M * 3]
        products = (matrices[:, :, at : at + DEEP] @ inputs).astype(mx.int32)
        high, low = products[:, :TOGETHER], products[:, TOGETHER:]
        total = total + (high * step + low)
    return total


def _levels(sums: mx.array, precision: int) -> mx.array:
    """Sums of weighted bytes -> bytes, rounded as Pillow rounds: up from a half."""
    half = 1 << (precision - 1)
    return mx.clip(mx.right_shift(sums + half, precision), 0, 255).astype(mx.uint8)
