"""The paper's claims as data -> checked objects; a claim and our figure -> a verdict.

The data are the JSON lists in `data` beside this file. Pure: nothing is timed or built here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_vlm_edge.errors import UsageError

DATA = Path(__file__).parent / "data"
REPRODUCED = 0.9  # of a claimed ratio
COUNTED = 0.005  # relative: what rounding explains
PARTS = ("vision", "connector", "prefill", "language")
CONNECTORS = ("mlp2x", "ldp", "ldpv2")
# kind -> whether two subjects are compared, and what "better" may be
KINDS = {
    "ms": (False, ("lower",)),
    "ms_ratio": (True, ("higher", "lower")),
    "tokens": (False, ("equal",)),
    "tokens_ratio": (True, ("equal", "higher")),
    "params_M": (False, ("equal",)),
    "params_ratio": (True, ("equal", "higher")),
    "macs_G": (False, ("equal",)),
    "macs_ratio": (True, ("equal", "higher")),
}
UNITS = {"ms": "ms", "tokens": "tokens", "params_M": "M", "macs_G": "G"}


@dataclass(frozen=True)
class Part:
    """One thing to time or to count. times: tiles. tokens: of a prefill. type: of a connector.

    layers: of the published tower, when parameters are counted and the model's copy has fewer.
    """

    part: str
    model: str
    resolution: int | None = None
    times: int = 1
    tokens: int | None = None
    type: str | None = None
    layers: int | None = None


@dataclass(frozen=True)
class Subject:
    """The sum of its parts, or a model that we cannot run and why."""

    name: str
    parts: tuple[Part, ...] = ()
    not_runnable: str = ""
    quoted: float | None = None


@dataclass(frozen=True)
class Paper:
    """What the paper says, where, measured on what; milliseconds compare on `chip` only.

    value: None where it prints no figure and ours is told alone.
    """

    value: float | None
    unit: str
    chip: str | None
    machine: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim; data/README.md explains every field."""

    id: str
    title: str
    kind: str
    paper: Paper
    ours: Subject
    against: Subject | None
    better: str
    within: float = COUNTED

    @property
    def timed(self) -> bool:
        return self.kind in ("ms", "ms_ratio")

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return (self.ours,) if self.against is None else (self.ours, self.against)

    @property
    def unit(self) -> str:
        """Of our figure: "x" for a ratio."""
        return UNITS.get(self.kind, "x")


@dataclass(frozen=True)
class Verdict:
    """word: "reproduced", "not reproduced", "not compared" or "not runnable here"."""

    word: str
    why: str = ""


def read(folder: Path | None = None) -> list[Claim]:
    """All claims, file after file. Raises UsageError for data that does not follow the schema."""
    folder = folder or DATA
    claims: list[Claim] = []
    for path in sorted(folder.glob("*.json")):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path.name}: not valid JSON ({error})") from None
        if not isinstance(entries, list):
            raise UsageError(f"{path.name}: not a list of claims")
        claims += [_claim(entry, path.name) for entry in entries]
    if twice := {claim.id for claim in claims if sum(claim.id == c.id for c in claims) > 1}:
        raise UsageError(f"claims: {min(twice)} is there twice")
    return claims


def chosen(claims: Sequence[Claim], ids: Sequence[str]) -> list[Claim]:
    """The claims named, in their order; all of them when none is. Raises UsageError for others."""
    known = {claim.id for claim in claims}
    if unknown := [name for name in ids if name not in known]:
        raise UsageError(f"no claim is called {unknown[0]!r}; `--claims list` shows all")
    return [claim for claim in claims if not ids or claim.id in ids]


def _claim(entry: Any, file: str) -> Claim:
    name = entry.get("id") if isinstance(entry, Mapping) else None
    try:
        against = entry["against"]
        fields_of_claim = _object(Claim, entry) | {
            "paper": Paper(**_object(Paper, entry["paper"])),
            "ours": _subject(entry["ours"]),
            "against": None if against is None else _subject(against),
        }
        claim = Claim(**fields_of_claim)
        _check(claim)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: claim {name!r}: {error}") from None
    return claim


def _object(kind: type, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's keys, which must be the fields of a dataclass, all without a default there."""
    known = {field.name: field.default is MISSING for field in fields(kind)}
    if unknown := entry.keys() - known.keys():
        raise ValueError(f"{min(unknown)!r} is not known")
    if lacking := [key for key, needed in known.items() if needed and key not in entry]:
        raise ValueError(f"{lacking[0]!r} is missing")
    return dict(entry)


def _subject(entry: Mapping[str, Any]) -> Subject:
    subject = _object(Subject, entry)
    parts = tuple(Part(**_object(Part, part)) for part in entry.get("parts", ()))
    return Subject(**subject | {"parts": parts})


def _check(claim: Claim) -> None:
    if claim.kind not in KINDS:
        raise ValueError(f"kind {claim.kind!r} is not one of {', '.join(KINDS)}")
    compared, better = KINDS[claim.kind]
    if claim.better not in better:
        raise ValueError(f"better of {claim.kind} is {' or '.join(better)}, not {claim.better!r}")
    if compared != (claim.against is not None):
        raise ValueError(f"{claim.kind} {'needs' if compared else 'takes no'} 'against'")
    for subject in claim.subjects:
        if bool(subject.parts) == bool(subject.not_runnable):
            raise ValueError(f"{subject.name}: either parts or not_runnable")
        for part in subject.parts:
            _check_part(part, claim.timed)


def _check_part(part: Part, timed: bool) -> None:
    if part.part not in PARTS:
        raise ValueError(f"part {part.part!r} is not one of {', '.join(PARTS)}")
    if (part.tokens is not None) != (part.part == "prefill"):
        raise ValueError("'tokens' belong to a prefill, which needs them")
    if part.type is not None and (part.part != "connector" or part.type not in CONNECTORS):
        raise ValueError(f"type is one of {', '.join(CONNECTORS)}, of a connector")
    if part.part == "language" and timed:
        raise ValueError("a 'language' part has no time: its prefill has")


def verdict(claim: Claim, ours: float, same_chip: bool) -> Verdict:
    """What our figure says of a claim; milliseconds say nothing from another chip."""
    paper = claim.paper.value
    if paper is None:
        return Verdict("not compared", "the paper prints no figure")
    if claim.kind == "ms" and not same_chip:
        return Verdict("not compared", f"milliseconds of {claim.paper.chip or 'another machine'}")
    if claim.better == "equal":
        off = ours / paper - 1
        word = "reproduced" if abs(off) <= claim.within else "not reproduced"
        return Verdict(word, f"{off:+.1%}" if abs(off) >= 5e-4 else "equal")
    reached = paper / ours if claim.better == "lower" else ours / paper
    word = "reproduced" if reached >= REPRODUCED else "not reproduced"
    return Verdict(word, f"{reached:.0%} of the claim")


def counts(verdicts: Iterable[str]) -> str:
    """ "2 reproduced, 1 not runnable here"."""
    words = list(verdicts)
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
