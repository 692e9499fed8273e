"""Times of single runs -> the figures that are printed. Pure arithmetic: no clock, no model.

Seconds in and out; rates are tokens per second.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WIDE = 0.25  # the spread from which no ratio is told, and a median with its range only
UNACCOUNTED = 0.05  # of a staged run's time, that its stages may leave out
VISION, PREFILL = "vision", "prefill"


@dataclass(frozen=True)
class Figure:
    """One thing measured repeatedly. `first` is the warm-up's value, which counts nowhere else."""

    values: tuple[float, ...]
    first: float | None = None

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def minimum(self) -> float:
        return min(self.values)

    @property
    def spread(self) -> float | None:
        """(maximum - minimum) / minimum; None for a single run, which does not tell it."""
        if len(self.values) < 2:
            return None
        least = min(self.values)
        return (max(self.values) - least) / least if least else float("inf")

    def scaled(self, factor: float) -> "Figure":
        first = None if self.first is None else self.first * factor
        return Figure(tuple(value * factor for value in self.values), first)

    def record(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "min": self.minimum,
            "max": max(self.values),
            "spread": self.spread,
            "values": list(self.values),
            "first": self.first,
        }


def added(figures: Sequence[Figure]) -> Figure:
    """The sum of figures, run by run: the i-th value is the sum of the i-th values."""
    first = [figure.first for figure in figures]
    return Figure(
        tuple(map(sum, zip(*(figure.values for figure in figures), strict=True))),
        None if None in first else sum(value for value in first if value is not None),
    )


@dataclass(frozen=True)
class Ratio:
    """over / under, or why there is none."""

    value: float | None
    refusal: str = ""


def ratio(over: Figure, under: Figure, names: tuple[str, str]) -> Ratio:
    """The ratio of two medians; refused when one side's runs differ by more than WIDE."""
    for name, figure in zip(names, (over, under), strict=True):
        if figure.spread is None:
            return Ratio(None, f"no ratio: {name} was run once, which tells no spread")
        if figure.spread > WIDE:
            return Ratio(
                None,
                f"no ratio: the runs of {name} spread by {figure.spread:.0%}, more than "
                f"{WIDE:.0%}; repeat on a quiet machine",
            )
    return Ratio(over.median / under.median)


@dataclass(frozen=True)
class StagedRun:
    """A run with every stage's arrays evaluated at its end: seconds by stage, and in all."""

    stages: Mapping[str, float]
    total: float

    @property
    def ttft(self) -> float:
        """The paper's: the vision encoder's time and the prefill's, and nothing else.

        No image decoding, preprocessing, connector or sampling; the prefill is of the whole prompt,
        where the paper's is of its visual tokens.
        """
        return self.stages.get(VISION, 0.0) + self.stages[PREFILL]

    @property
    def unaccounted(self) -> float:
        """The share of the total that no stage has."""
        return abs(sum(self.stages.values()) - self.total) / self.total


@dataclass(frozen=True)
class PlainRun:
    """A run without stage boundaries: as `generate` does it."""

    ttft_e2e: float
    decode_tps: float
    prompt_tokens: int
    visual_tokens: int
    generated: int
    peak_memory: float  # GB (1e9 bytes), by mx.get_peak_memory


@dataclass(frozen=True)
class ColdRun:
    """A fresh process: from its start to its first text, with what was inside, and its memory."""

    ttft_cold: float
    inside: Mapping[str, float]  # seconds: import, load, first answer
    rss: float  # GB, the high-water mark of resident memory
    peak_memory: float  # GB, by mx.get_peak_memory


@dataclass(frozen=True)
class Runs:
    """All runs of a case, the warm-up first in each list; `cold` may be empty."""

    staged: Sequence[StagedRun]
    plain: Sequence[PlainRun]
    cold: Sequence[ColdRun] = ()


def doubts(figures: Mapping[str, Figure]) -> dict[str, str]:
    """Why a figure's median alone would mislead, by its name.

    Its runs spread too far, or the part comes out above the whole: ttft above ttft_e2e.
    """
    told = {
        name: f"its runs spread by {figure.spread:.0%}, more than {WIDE:.0%}"
        for name, figure in figures.items()
        if figure.spread is not None and figure.spread > WIDE
    }
    part, whole = figures.get("ttft"), figures.get("ttft_e2e")
    if part and whole and part.median > whole.median:
        for name in ("ttft", "ttft_e2e"):
            told.setdefault(name, "ttft, a part of ttft_e2e, came out above it")
    return told


def figures(runs: Runs) -> dict[str, Figure]:
    """The figures of a case by name, in the order they are shown; stages as "stage: NAME".

    ttft, prefill_tps and stages are from the staged runs, ttft_e2e, decode_tps and prompt_tps from
    the others: prompt_tps is all prompt tokens by ttft_e2e, prefill_tps by the prefill's time.
    """
    staged, plain = runs.staged, runs.plain
    prompt = plain[0].prompt_tokens
    named = {
        "ttft": _figure(staged, lambda run: run.ttft),
        "ttft_e2e": _figure(plain, lambda run: run.ttft_e2e),
    }
    if runs.cold:
        named["ttft_cold"] = _figure(runs.cold, lambda run: run.ttft_cold)
        for name in runs.cold[0].inside:
            named[f"cold: {name}"] = _figure(runs.cold, lambda run, n=name: run.inside[n])
        named["rss"] = _figure(runs.cold, lambda run: run.rss)
    for name in staged[0].stages:
        named[f"stage: {name}"] = _figure(staged, lambda run, n=name: run.stages[n])
    named["staged total"] = _figure(staged, lambda run: run.total)
    named["prompt_tps"] = _figure(plain, lambda run: prompt / run.ttft_e2e)
    named["prefill_tps"] = _figure(staged, lambda run: prompt / run.stages[PREFILL])
    if plain[0].generated > 1:
        named["decode_tps"] = _figure(plain, lambda run: run.decode_tps)
    named["peak_memory"] = _figure(plain, lambda run: run.peak_memory)
    return named


def _figure(runs: Sequence[Any], value: Callable[..., float]) -> Figure:
    """A figure of the runs after the first, or of that one when there is no other."""
    first, *rest = map(value, runs)
    return Figure(tuple(rest) or (first,), first if rest else None)


def unaccounted(runs: Iterable[StagedRun]) -> float:
    """The largest share of a staged run that its stages leave out."""
    return max(run.unaccounted for run in runs)
