"""How far what a package computes is from what MLX computes, and how far it may be."""

from dataclasses import dataclass, field

import numpy as np


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
    """What running a saved package showed. ranges: largest |x| of each operation's output."""

    parity: tuple[Parity, ...]
    ranges: dict[str, float] = field(default_factory=dict)


def distance(actual: np.ndarray | None, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||, of zeros ||actual||.

    Infinite where the array is missing, of another shape or not finite.
    """
    if actual is None or np.shape(actual) != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    wide = expected.astype(np.float64)
    size = float(np.linalg.norm(wide)) or 1.0
    return float(np.linalg.norm(np.asarray(actual, np.float64) - wide)) / size
