"""Paired runs of two programs -> minima, medians, spread, and a ratio or why there is none.

Pure arithmetic: values come in, in the order they were measured; less is better in all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WIDE = 0.25  # the spread from which no ratio is told
COUNTED = 0.75  # of the runs, the fastest, are what the spread is taken of


def spread(values: Sequence[float]) -> float:
    """(slowest - fastest) / fastest of the fastest three quarters; 0 for one run.

    Other programs' load only ever adds time, so one slow run among several says nothing about the
    rest: [10, 11, 12, 30] -> 0.2, [10, 14, 15, 30] -> 0.5.
    """
    fastest = _fastest(values)
    return (fastest[-1] - fastest[0]) / fastest[0]


def _fastest(values: Sequence[float]) -> list[float]:
    """Three quarters of the runs, in order."""
    return sorted(values)[: max(1, math.ceil(COUNTED * len(values)))]


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
    def at_least(self) -> float:
        """What the ratio is at least, however far the runs lie apart.

        The peer's fastest run / the slowest of the fastest three quarters of ours.
        """
        return min(self.peer) / max(_fastest(self.ours))

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

    A refusal, the caller's or the runs' own, leaves no ratio in the record. Runs that lie too far
    apart still tell what the ratio is at least, and meet a target that is no more than that.
    """
    pairs = best_attempt(attempts)
    recorded = pairs.record()
    bound = None if refusal or len(pairs.ours) < 2 else pairs.at_least
    met = None
    if refusal := refusal or pairs.refusal:
        recorded |= dict.fromkeys(("ratio_of_minima", "median_pair_ratio", "pair_ratios"))
        if target is not None and bound is not None and bound >= target:
            met = True
    elif target is not None:
        met = min(recorded["ratio_of_minima"], recorded["median_pair_ratio"]) >= target
    return recorded | {"at_least": bound, "refusal": refusal, "target": target, "met": met}


def ratio(row: Mapping[str, Any]) -> str:
    """A row's ratio, or why there is none, for people."""
    if not row["refusal"]:
        return f"{row['ratio_of_minima']:.2f}x (pairs {row['median_pair_ratio']:.2f}x)"
    bound = row.get("at_least")
    return (f"at least {bound:.2f}x" if bound else "no ratio") + f": {row['refusal']}"
