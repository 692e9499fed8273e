"""Paired runs of two programs -> minima, medians, spread, and a ratio or why there is none.

Pure arithmetic: values come in, in the order they were measured; less is better in all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WIDE = 0.25  # the spread from which no ratio is told
KEPT = 0.75  # of the runs, the fastest, are what the spread is taken of


def spread(values: Sequence[float]) -> float:
    """(slowest - fastest) / fastest of the fastest three quarters; 0 for one run.

    Other programs' load only ever adds time, so one slow run among several says nothing about the
    rest: [10, 11, 12, 30] -> 0.2, [10, 14, 15, 30] -> 0.5.
    """
    kept = sorted(values)[: max(1, math.ceil(KEPT * len(values)))]
    return (kept[-1] - kept[0]) / kept[0]


def figure(values: Sequence[float]) -> dict[str, Any]:
    """One side's runs as they are recorded."""
    return {
        "min": min(values),
        "median": median(values),
        "max": max(values),
        "spread": spread(values),
        "values": list(values),
    }


@dataclass(frozen=True)
class Pairs:
    """Runs in pairs: the i-th of both were measured one right after the other."""

    ours: Sequence[float]
    peer: Sequence[float]

    @property
    def widest(self) -> float:
        return max(spread(self.ours), spread(self.peer))

    def record(self) -> dict[str, Any]:
        """Both sides, and of the ratios peer / ours: that of the minima and the pairs' median."""
        ratios = [theirs / own for own, theirs in zip(self.ours, self.peer, strict=True)]
        return {
            "ours": figure(self.ours),
            "peer": figure(self.peer),
            "ratio_of_minima": min(self.peer) / min(self.ours),
            "median_pair_ratio": median(ratios),
            "pair_ratios": ratios,
        }

    @property
    def refusal(self) -> str:
        """Why the runs allow no ratio; "" when they do."""
        if len(self.ours) < 2:
            return "one run has no spread"
        if self.widest > WIDE:
            return f"the runs spread by {self.widest:.0%}, more than {WIDE:.0%}"
        return ""


def best_attempt(attempts: Sequence[Pairs]) -> Pairs:
    """The attempt whose runs lie closest together."""
    return min(attempts, key=lambda pairs: pairs.widest)


def verdict(attempts: Sequence[Pairs], target: float | None, refusal: str = "") -> dict[str, Any]:
    """What a row comes to. Both ratios must reach the target for it to be met.

    A refusal, the caller's or the runs' own, leaves no ratio at all in the record.
    """
    pairs = best_attempt(attempts)
    found = pairs.record()
    refusal = refusal or pairs.refusal
    if refusal:
        for name in ("ratio_of_minima", "median_pair_ratio", "pair_ratios"):
            found[name] = None
    reached = None if refusal else min(found["ratio_of_minima"], found["median_pair_ratio"])
    met = None if target is None or reached is None else reached >= target
    return found | {"refusal": refusal, "target": target, "met": met}
