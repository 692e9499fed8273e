"""A claim -> its record: our figure, how it was got, and the verdict."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_vlm_edge.loading import memory
from mlx_vlm_edge.wording import gigabytes

from ..bench import machine
from ..bench.figures import Figure, added, ratio
from .counted import counted, flops, nbytes
from .read import Claim, Subject, Verdict, verdict
from .timed import PartTimer

Progress = Callable[[str], None]
NOT_HERE = "not runnable here"
ALLOWANCE = 1_500_000_000  # bytes for the activations of a part that is run by itself


@dataclass(frozen=True)
class Setting:
    """Where claims are run. named: whether the user asked for just these."""

    machine: Mapping[str, Any]
    runs: int
    named: bool

    @property
    def on_gpu(self) -> bool:
        return bool(self.machine["device"] == "GPU")


def run(claim: Claim, setting: Setting, timer: PartTimer, progress: Progress) -> dict[str, Any]:
    """Count or time one claim. What cannot be run here has the reason in place of a figure."""
    outcome = _not_here(claim, setting, timer)
    if outcome is None:
        outcome = (
            _timed(claim, setting, timer, progress) if claim.timed else _counted(claim, setting)
        )
    return {
        "id": claim.id,
        "title": claim.title,
        "kind": claim.kind,
        "unit": claim.unit,
        "paper": asdict(claim.paper),
        "ours": claim.ours.name,
        "against": claim.against.name if claim.against else None,
        "better": claim.better,
        **_predicted(claim),
        **outcome,
    }


def _not_here(claim: Claim, setting: Setting, timer: PartTimer) -> dict[str, Any] | None:
    """The record of a claim that cannot be run, and why; None when it can."""
    if why := claim.not_runnable:
        return _verdict(Verdict(NOT_HERE, why))
    if not claim.timed:
        return None
    chip = setting.machine["chip"]
    same = machine.same_chip(chip, claim.paper.chip)
    if claim.absolute and not (same or setting.on_gpu or setting.named):
        return _verdict(
            Verdict(
                "not compared",
                f"{claim.of_chip} say nothing on a CPU ({chip}); name the claim to time it all the "
                "same",
            )
        )
    return _too_large(claim, timer)


def _too_large(claim: Claim, timer: PartTimer) -> dict[str, Any] | None:
    parts = [part for subject in claim.subjects for part in subject.parts]
    free = memory.usable()
    if free is not None and timer.missing(parts) + ALLOWANCE > free:
        timer.clear()
        free = memory.usable() or 0
        needed = timer.missing(parts) + ALLOWANCE
        if needed > free and timer.cut(parts):
            needed = timer.missing(parts) + ALLOWANCE
        if needed > free:
            why = f"needs {gigabytes(needed)}, {gigabytes(free)} are free"
            return _verdict(Verdict(NOT_HERE, why))
    return None


def _verdict(verdict: Verdict, **more: Any) -> dict[str, Any]:
    return {"verdict": verdict.word, "why": verdict.why, "figure": None, **more}


def _counted(claim: Claim, setting: Setting) -> dict[str, Any]:
    ours = counted(claim, claim.ours)
    sides = [ours]
    if claim.against is not None:
        sides.append(counted(claim, claim.against))
    figure = sides[1] / ours if claim.against else ours
    return {
        **_verdict(verdict(claim, figure, same_chip=True)),
        "figure": figure,
        "sides": sides,
        "how": "counted",
    }


def _timed(claim: Claim, setting: Setting, timer: PartTimer, progress: Progress) -> dict[str, Any]:
    """Both subjects in turn, run after run; a ratio of medians."""
    progress("making random weights")
    runners = [[timer.timed(part) for part in subject.parts] for subject in claim.subjects]
    taken: list[list[list[float]]] = [[[] for _ in parts] for parts in runners]
    for index in range(setting.runs + 1):
        progress("warm-up" if not index else f"run {index} of {setting.runs}")
        for side, parts in enumerate(runners):
            for place, timed in enumerate(parts):
                taken[side][place].append(timed())
    sides = [[Figure(tuple(times[1:]), times[0]) for times in parts] for parts in taken]
    totals = [added(parts) for parts in sides]
    return {
        **_figure(claim, totals, setting),
        "sides": [total.scaled(1000).record() for total in totals],
        "parts": [_parts(*pair) for pair in zip(claim.subjects, sides, strict=True)],
        "how": _how(claim, timer),
    }


def _figure(claim: Claim, totals: list[Figure], setting: Setting) -> dict[str, Any]:
    if claim.kind == "tokens_per_s":
        figure = claim.ours.decoded / totals[0].median
    elif claim.against is None:
        figure = totals[0].median * 1000
    else:
        compared = ratio(totals[1], totals[0], (claim.against.name, claim.ours.name))
        if compared.value is None:
            return _verdict(Verdict("not compared", compared.refusal))
        figure = compared.value
    same = machine.same_chip(setting.machine["chip"], claim.paper.chip)
    return {**_verdict(verdict(claim, figure, same)), "figure": figure}


def _parts(subject: Subject, figures: list[Figure]) -> list[dict[str, Any]]:
    return [
        {**asdict(part), "ms": figure.scaled(1000).record()}
        for part, figure in zip(subject.parts, figures, strict=True)
    ]


def _how(claim: Claim, timer: PartTimer) -> str:
    parts = [part for subject in claim.subjects for part in subject.parts]
    said = list(dict.fromkeys(filter(None, map(timer.how, parts))))
    return f"in parts: {'; '.join(said)}" if said else "run whole"


def _predicted(claim: Claim) -> dict[str, Any]:
    """What a ratio of times would be by operations alone, or by bytes where tokens are decoded.

    An estimate. Bytes are those of weights and activations that every token reads.
    """
    if claim.against is None or not claim.timed or not all(s.parts for s in claim.subjects):
        return {"predicted": None}
    decoded = claim.ours.decoded > 0
    cost = nbytes if decoded else flops
    by = "bytes moved" if decoded else "operations"
    return {"predicted": cost(claim.against) / cost(claim.ours), "predicted_by": by}
