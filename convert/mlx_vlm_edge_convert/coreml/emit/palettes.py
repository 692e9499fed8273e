"""Palettes: 16 or 64 values for every few rows of a matrix, by k-means; 4 or 6 bits a weight."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from .toolkit import tools

PALETTES = {"palette4": 4, "palette6": 6}  # bits of a weight
ROWS = 16  # rows that share a table, at the most
STEPS = 60  # of Lloyd's iteration, at the most
CUTS = 128  # places of each kind at which the runs of a start may begin


@dataclass(frozen=True)
class Palette:
    """data uint8 [out, in] of indices, table float32 [tables, 16 or 64], each for
    out / tables rows."""

    data: np.ndarray
    table: np.ndarray

    @property
    def kind(self) -> str:
        """For the manifest."""
        return f"palettes of {self.table.shape[1]} for {len(self.data) // len(self.table)} rows"

    @property
    def nbytes(self) -> int:
        """In a float16 package."""
        entries = self.table.shape[1]
        return self.data.size * (entries.bit_length() - 1) // 8 + 2 * self.table.size

    def rows(self, part: slice) -> "Palette":
        """Some of the outputs, whole tables of them."""
        each = len(self.data) // len(self.table)
        start, stop, _ = part.indices(len(self.data))
        return Palette(self.data[start:stop], self.table[start // each : -(-stop // each)])

    def dense(self) -> np.ndarray:
        """The weights they stand for, float32 [out, in]."""
        table = np.repeat(self.table, len(self.data) // len(self.table), 0)
        return np.take_along_axis(table, self.data.astype(np.intp), 1)

    def emit(self, half: bool, extra: tuple[int, ...]) -> Any:
        """A constant of MIL [out, in, *extra] that the device looks up."""
        mb, types = tools().mb, tools().types
        kind = np.float16 if half else np.float32
        entries = self.table.shape[1]
        packed = {16: types.np_uint4_dtype, 64: types.np_uint6_dtype}[entries]
        indices = self.data.view(packed).reshape(*self.data.shape, *extra)
        blocks = (len(self.table), *[1] * (indices.ndim - 1), entries, 1)
        return mb.constexpr_lut_to_dense(
            indices=indices, lut=self.table.astype(kind).reshape(blocks)
        )


def palette(weight: np.ndarray, bits: int) -> Palette:
    """float32 [out, in] -> its palettes, one for each 16 rows where 16 divides them."""
    count = len(weight) // gcd(len(weight), ROWS)
    blocks = weight.reshape(count, -1)
    tables = np.stack([_centres(block, 1 << bits) for block in blocks])
    data = np.stack(
        [np.searchsorted(_edges(t), block) for t, block in zip(tables, blocks, strict=True)]
    )
    return Palette(data.astype(np.uint8).reshape(weight.shape), tables)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Where the nearest of sorted centres changes."""
    return (centres[1:] + centres[:-1]) / 2


def _centres(values: np.ndarray, count: int) -> np.ndarray:
    """So many numbers near which all values lie, ascending: the values where there are no more."""
    ordered = np.sort(values)
    distinct = np.unique(ordered)
    if len(distinct) <= count:
        return np.pad(distinct, (0, count - len(distinct)), mode="edge")
    return _k_means(ordered, _best_cuts(ordered, count))


def _best_cuts(ordered: np.ndarray, count: int) -> np.ndarray:
    """The means of `count` runs of sorted values, the best ones that begin at some 256 places: as
    many values apart, and as far apart, so that dense parts and outliers both have some.

    By dynamic programming: the least error of the first values in k + 1 runs is that of fewer
    values in k, and one run more. Source: Wang and Song, The R Journal 3 (2011), Ckmeans.1d.dp.
    """
    among = np.linspace(0, len(ordered), CUTS + 1).astype(int)
    along = np.searchsorted(ordered, np.linspace(ordered[0], ordered[-1], CUTS + 1))
    cuts = np.union1d(among, along)
    zero = np.zeros(1)
    sums = np.concatenate([zero, np.cumsum(ordered, dtype=np.float64)])[cuts]
    squares = np.concatenate([zero, np.cumsum(np.square(ordered, dtype=np.float64))])[cuts]
    counts = cuts[None] - cuts[:, None]  # [from, to]
    spread = (squares[None] - squares[:, None]) - (sums[None] - sums[:, None]) ** 2 / np.maximum(
        counts, 1
    )
    spread = np.where(counts > 0, spread, np.inf)
    least, begins = spread[0], []
    for _ in range(count - 1):
        errors = least[:, None] + spread
        begins.append(errors.argmin(0))
        least = errors.min(0)
    ends = [len(cuts) - 1]
    for begin in reversed(begins):
        ends.append(int(begin[ends[-1]]))
    runs = np.array([0, *ends[::-1]])
    return (np.diff(sums[runs]) / np.diff(cuts[runs])).astype(np.float32)


def _k_means(ordered: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Lloyd's iteration from a start, with exact sums over the sorted values."""
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    for _ in range(STEPS):
        inner = np.searchsorted(ordered, _edges(centres))
        ends = np.concatenate([[0], inner, [len(ordered)]])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        moved = np.sort(np.where(counts > 0, means, centres).astype(np.float32))
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres
