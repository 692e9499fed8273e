"""How far what a package computes is from what MLX computes, and how far it may be."""

import math
from dataclasses import dataclass, field

import numpy as np

BLOCK = 1 << 20  # values that are in float64 at a time: matrices have a hundred million


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


def distance(actual: np.ndarray | None, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||, of zeros ||actual||.

    Infinite where the array is missing, of another shape or not finite.
    """
    if actual is None or np.shape(actual) != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    off, size = 0.0, 0.0
    one, other = np.ravel(actual), np.ravel(expected)
    for start in range(0, other.size, BLOCK):
        part = slice(start, start + BLOCK)
        wide = other[part].astype(np.float64)
        size += float(np.dot(wide, wide))
        wide -= one[part]
        off += float(np.dot(wide, wide))
    return math.sqrt(off) / (math.sqrt(size) or 1.0)
