"""How far what a package computes is from what MLX computes, and how far it may be."""

import math
from dataclasses import dataclass, field

import numpy as np

BLOCK = 1 << 16  # values that are in float64 at a time, and stay in a processor's cache


@dataclass(frozen=True)
class Parity:
    """How far a package is from the MLX model: ||a - b|| / ||b||, and what it must stay below."""

    part: str
    inputs: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is below the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Check:
    """What running a saved package showed.

    ranges: largest |x| of each operation's output. summed: of how many values each mean is. trial:
    what goes in and what comes out, by which a device can tell whether it computes the same.
    """

    parity: tuple[Parity, ...]
    ranges: dict[str, float] = field(default_factory=dict)
    trial: dict[str, np.ndarray] = field(default_factory=dict)
    summed: dict[str, float] = field(default_factory=dict)

    def joined(self, more: "Check") -> "Check":
        """What this run of a package and another one showed."""
        names = {**self.ranges, **more.ranges}
        ranges = {n: _larger(self.ranges.get(n, 0.0), more.ranges.get(n, 0.0)) for n in names}
        parity, summed = (*self.parity, *more.parity), {**self.summed, **more.summed}
        return Check(parity, ranges, {**self.trial, **more.trial}, summed)


def _larger(one: float, other: float) -> float:
    """NaN where either is."""
    return one if math.isnan(one) else other if math.isnan(other) else max(one, other)


class Distance:
    """||actual - expected|| / ||expected|| of arrays that come in parts, of zeros ||actual||.

    Infinite where a part is missing, of another shape or not finite.
    """

    def __init__(self) -> None:
        self._off = self._size = 0.0

    def add(self, actual: np.ndarray | None, expected: np.ndarray) -> None:
        """One part more."""
        if actual is None or np.shape(actual) != expected.shape or not np.isfinite(actual).all():
            self._off = float("inf")
            return
        one, other = np.ravel(actual), np.ravel(expected)
        for start in range(0, other.size, BLOCK):
            part = slice(start, start + BLOCK)
            wide = other[part].astype(np.float64)
            self._size += float(np.dot(wide, wide))
            wide -= one[part]
            self._off += float(np.dot(wide, wide))

    @property
    def value(self) -> float:
        """Of all so far."""
        return math.sqrt(self._off) / (math.sqrt(self._size) or 1.0)


def distance(actual: np.ndarray | None, expected: np.ndarray) -> float:
    """The same of whole arrays."""
    apart = Distance()
    apart.add(actual, expected)
    return apart.value
