"""The paper's claims as data -> checked objects; a claim and our figure -> a verdict.

The data are the JSON lists in `data` beside this file. Pure: nothing is timed or built here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from mlx_vlm_edge.errors import UsageError

DATA = Path(__file__).parent / "data"
REPRODUCED = 0.9  # of a claimed ratio
COUNTED = 0.005  # relative: what rounding explains
PARTS = ("vision", "connector", "prefill", "decode", "language")
AFTER_TOKENS = ("prefill", "decode")  # parts whose `tokens` are those of the prompt
CONNECTORS = ("mlp2x", "ldp", "ldpv2")
BITS = (2, 3, 4, 5, 6, 8)
COUNTS, TIMINGS = "counts", "timings"


@dataclass(frozen=True)
class Kind:
    """compared: whether it is a ratio of two subjects. better: what a claim of it may say."""

    group: str
    compared: bool
    better: tuple[str, ...]
    unit: str = "x"


KINDS = {
    "ms": Kind(TIMINGS, False, ("lower",), "ms"),
    "ms_ratio": Kind(TIMINGS, True, ("higher", "lower")),
    "tokens_per_s": Kind(TIMINGS, False, ("higher",), "tokens/s"),
    "tokens_per_s_ratio": Kind(TIMINGS, True, ("higher",)),
    "tokens": Kind(COUNTS, False, ("equal",), "tokens"),
    "tokens_ratio": Kind(COUNTS, True, ("equal", "higher")),
    "params_M": Kind(COUNTS, False, ("equal",), "M"),
    "params_ratio": Kind(COUNTS, True, ("equal", "higher")),
    "macs_G": Kind(COUNTS, False, ("equal",), "G"),
    "macs_ratio": Kind(COUNTS, True, ("equal", "higher")),
}


@dataclass(frozen=True)
class Part:
    """One thing to time or to count. times: tiles, or tokens that are decoded.

    tokens: positions of a prefill, or before a decode. type: of a connector. bits: of a language
    model.
    layers: of the published tower, when parameters are counted and the model's copy has fewer.
    """

    part: str
    model: str
    resolution: int | None = None
    times: int = 1
    tokens: int | None = None
    type: str | None = None
    layers: int | None = None
    bits: int | None = None


@dataclass(frozen=True)
class Subject:
    """The sum of its parts, or a model that we cannot run and why."""

    name: str
    parts: tuple[Part, ...] = ()
    not_runnable: str = ""
    quoted: float | None = None

    @property
    def decoded(self) -> int:
        """Tokens that its parts decode."""
        return sum(part.times for part in self.parts if part.part == "decode")


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
        return KINDS[self.kind].group == TIMINGS

    @property
    def absolute(self) -> bool:
        """Whether it is a time or a speed by itself, which means nothing on another chip."""
        return self.timed and not KINDS[self.kind].compared

    @property
    def of_chip(self) -> str:
        """ "milliseconds of M1 Max"."""
        figure = "milliseconds" if self.kind == "ms" else "tokens per second"
        return f"{figure} of {self.paper.chip or 'another machine'}"

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return (self.ours,) if self.against is None else (self.ours, self.against)

    @property
    def not_runnable(self) -> str:
        """The subject that cannot be run on any machine, and why; "" where both can."""
        for subject in self.subjects:
            if subject.not_runnable:
                quoted = f" (the paper's {subject.quoted:,g})" if subject.quoted else ""
                return f"{subject.name}{quoted}: {subject.not_runnable}"
        return ""

    @property
    def unit(self) -> str:
        """Of our figure: "x" for a ratio."""
        return KINDS[self.kind].unit


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
    kind = KINDS[claim.kind]
    if claim.better not in kind.better:
        options = " or ".join(kind.better)
        raise ValueError(f"better of {claim.kind} is {options}, not {claim.better!r}")
    if kind.compared != (claim.against is not None):
        raise ValueError(f"{claim.kind} {'needs' if kind.compared else 'takes no'} 'against'")
    for subject in claim.subjects:
        if bool(subject.parts) == bool(subject.not_runnable):
            raise ValueError(f"{subject.name}: either parts or not_runnable")
        for part in subject.parts:
            _check_part(part, claim.timed)
        if claim.kind.startswith("tokens_per_s") and subject.parts and not subject.decoded:
            raise ValueError(f"{subject.name}: tokens per second need a 'decode' part")
    if len({subject.decoded for subject in claim.subjects if subject.parts}) > 1:
        raise ValueError("both decode as many tokens, or their times are of different answers")


def _check_part(part: Part, timed: bool) -> None:
    if part.part not in PARTS:
        raise ValueError(f"part {part.part!r} is not one of {', '.join(PARTS)}")
    if (part.tokens is not None) != (part.part in AFTER_TOKENS):
        raise ValueError("'tokens' belong to a prefill or a decode, which need them")
    if part.bits is not None and (part.part not in AFTER_TOKENS or part.bits not in BITS):
        raise ValueError("bits are 2, 3, 4, 5, 6 or 8, of a prefill or a decode")
    if part.part == "decode" and not timed:
        raise ValueError("a 'decode' part is timed: nothing of it is counted")
    if part.type is not None and (part.part != "connector" or part.type not in CONNECTORS):
        raise ValueError(f"type is one of {', '.join(CONNECTORS)}, of a connector")
    if part.part == "language" and timed:
        raise ValueError("a 'language' part has no time: its prefill has")


def verdict(claim: Claim, ours: float, same_chip: bool) -> Verdict:
    """What our figure says of a claim; times say nothing from another chip."""
    paper = claim.paper.value
    if paper is None:
        return Verdict("not compared", "the paper prints no figure")
    if claim.absolute and not same_chip:
        return Verdict("not compared", claim.of_chip)
    if claim.better == "equal":
        off = ours / paper - 1
        word = "reproduced" if abs(off) <= claim.within else "not reproduced"
        return Verdict(word, f"{off:+.1%}" if abs(off) >= 5e-4 else "equal")
    reached = paper / ours if claim.better == "lower" else ours / paper
    word = "reproduced" if reached >= REPRODUCED else "not reproduced"
    return Verdict(word, f"{reached:.0%} of the claim")


def tally(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How records came out, counts and timings apart: ("counts", "2 reproduced, 1 not compared").

    A count is reproduced on any machine, and says nothing of speed.
    """
    words: dict[str, list[str]] = {COUNTS: [], TIMINGS: []}
    for record in records:
        words[KINDS[record["kind"]].group].append(record["verdict"])
    return [
        (group, ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts)))
        for group, verdicts in words.items()
        if verdicts
    ]
