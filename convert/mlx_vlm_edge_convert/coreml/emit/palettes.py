"""Palettes: 16 values for every few rows of a matrix, found by k-means, and 4 bits a weight."""

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from .toolkit import tools

ENTRIES = 16
ROWS = 16  # rows that share a table, at the most
STEPS = 12  # of Lloyd's iteration; the tables change by less than 1 % of a step after that


@dataclass(frozen=True)
class Palette:
    """data uint8 [out, in] of indices, table float32 [tables, 16], each for out / tables rows."""

    data: np.ndarray
    table: np.ndarray

    @property
    def kind(self) -> str:
        """For the manifest."""
        return f"palettes of {ENTRIES} for {len(self.data) // len(self.table)} rows"

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
        indices = self.data.astype(types.np_uint4_dtype).reshape(*self.data.shape, *extra)
        blocks = (len(self.table), *[1] * (indices.ndim - 1), ENTRIES, 1)
        return mb.constexpr_lut_to_dense(
            indices=indices, lut=self.table.astype(kind).reshape(blocks)
        )


def palette(weight: np.ndarray) -> Palette:
    """float32 [out, in] -> its palettes, one for each 16 rows where 16 divides them."""
    count = len(weight) // gcd(len(weight), ROWS)
    blocks = weight.reshape(count, -1)
    tables = np.stack([_centres(block) for block in blocks])
    data = np.stack(
        [np.searchsorted(_edges(t), block) for t, block in zip(tables, blocks, strict=True)]
    )
    return Palette(data.astype(np.uint8).reshape(weight.shape), tables)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Where the nearest of sorted centres changes."""
    return (centres[1:] + centres[:-1]) / 2


def _centres(values: np.ndarray) -> np.ndarray:
    """k-means of numbers, exact sums over the sorted values, from quantiles on; ascending."""
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    centres = ordered[((np.arange(ENTRIES) + 0.5) / ENTRIES * len(ordered)).astype(int)]
    for _ in range(STEPS):
        inner = np.searchsorted(ordered, _edges(centres))
        ends = np.concatenate([[0], inner, [len(ordered)]])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        centres = np.where(counts > 0, means, centres).astype(np.float32)
    return centres
