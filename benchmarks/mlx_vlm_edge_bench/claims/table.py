"""Records of claims -> text for a terminal of any width."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .read import KINDS, TIMINGS, Claim, tally

Record = Mapping[str, Any]
LABEL = 10  # columns of "verdict"
FIGURE = 14  # columns of a value and its unit


def claim(record: Record, width: int = 80) -> str:
    """One claim: what the paper says, ours, and the verdict."""
    paper = record["paper"]
    timed = KINDS[record["kind"]].group == TIMINGS
    machine = f"on {paper['machine']}" if timed and paper["machine"] else ""
    lines = [
        *textwrap.wrap(record["title"], width),
        *_entry("id", record["id"], width),
        *_entry("paper", f"{_value(paper['value'], paper['unit'])} {machine}", width),
        *_entry("", paper["source"], width),
    ]
    if paper["note"]:
        lines += _entry("", f"note: {paper['note']}", width)
    if record["figure"] is not None or record.get("sides"):
        lines += _entry("ours", _ours(record), width)
    if record.get("predicted"):
        said = f"{_value(record['predicted'], 'x')} by {record['predicted_by']} (an estimate)"
        lines += _entry("expected", said, width)
    why = f": {record['why']}" if record["why"] else ""
    lines += _entry("verdict", f"{record['verdict'].upper()}{why}", width)
    return "\n".join(line.rstrip() for line in lines)


def _ours(record: Record) -> str:
    """ "5.21 x = 120.3 ms (LLaVA) / 23.1 ms (FastVLM); run whole"."""
    names = [name for name in (record["ours"], record["against"]) if name]
    shown = [
        f"{_side(side, record['unit'], record['kind'])} ({name})"
        for side, name in zip(record["sides"], names, strict=True)
    ]
    how = f"; {record['how']}" if record["how"] else ""
    if len(shown) == 1:
        speed = record["unit"] == "tokens/s" and record["figure"] is not None
        figure = f"{_value(record['figure'], record['unit'])} = " if speed else ""
        return f"{figure}{shown[0]}{how}"
    figure = "no ratio" if record["figure"] is None else _value(record["figure"], "x")
    return f"{figure} = {shown[1]} / {shown[0]}{how}"


def _side(side: Any, unit: str, kind: str) -> str:
    if not isinstance(side, Mapping):
        name = {"params": "M", "macs": "G", "tokens": "tokens"}[kind.split("_")[0]]
        return _value(side, name)
    spread = "" if side["spread"] is None else f", spread {side['spread']:.0%}"
    return f"{side['median']:,.1f} ms{spread}"


def _value(value: float | None, unit: str) -> str:
    """4 significant digits: 85.1 x, 14,124 ms, 0.5 M; "no figure"."""
    if value is None:
        return "no figure"
    digits = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{digits} {unit}"


def _entry(label: str, text: str, width: int) -> list[str]:
    indent = " " * LABEL
    wrapped = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    if not wrapped:
        return []
    return [f"  {label}".ljust(LABEL) + wrapped[0][LABEL:], *wrapped[1:]]


def summary(records: Sequence[Record], width: int = 80) -> str:
    """A line per claim, counts and timings apart: paper, ours, verdict; and how they came out."""
    room = max((len(record["id"]) for record in records), default=0)
    wide = width >= room + 2 * FIGURE + len("  not runnable here")
    told = []
    for group, verdicts in tally(records):
        members = [record for record in records if KINDS[record["kind"]].group == group]
        head = f"{group:{room}}{'paper':>{FIGURE}}{'ours':>{FIGURE}}" if wide else group
        lines = [head, *(_line(record, room, wide) for record in members)]
        told.append("\n".join([*lines, f"{group}, {len(members)}: {verdicts}"]))
    return "\n\n".join(told)


def _line(record: Record, room: int, wide: bool) -> str:
    if not wide:
        return f"{record['verdict']}: {record['id']}"
    paper, ours = record["paper"], record["figure"]
    said = "-" if ours is None else _value(ours, record["unit"])
    claimed = _value(paper["value"], paper["unit"])
    return f"{record['id']:{room}}{claimed:>{FIGURE}}{said:>{FIGURE}}  {record['verdict']}"


def listed(claims: Sequence[Claim], width: int = 80) -> str:
    """Ids and titles; at the end those that no machine can run, and why."""
    room = max((len(claim.id) for claim in claims), default=0) + 2
    lines = [_pair(claim.id, claim.title, room, width) for claim in claims]
    closed = [claim for claim in claims if claim.not_runnable]
    runnable = len(claims) - len(closed)
    lines += ["", f"{runnable} of {len(claims)} can be run where there is memory for them."]
    if closed:
        lines += ["Not runnable:"]
        lines += [_pair(claim.id, claim.not_runnable, room, width) for claim in closed]
    return "\n".join(lines)


def _pair(name: str, text: str, room: int, width: int) -> str:
    """A name and its text beside it, or below it where there is no room."""
    if room + 30 > width:
        return f"{name}\n    {text}"
    return textwrap.fill(text, width, initial_indent=name.ljust(room), subsequent_indent=" " * room)
