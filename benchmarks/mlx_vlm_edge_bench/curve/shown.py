"""Points of a curve -> a table for a terminal, and a page with two plots."""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..plots import STYLE, Point, scatter
from .run import WHOLE, series

Record = Mapping[str, Any]
HEAD = ("tokens", "by", "ttft ms", "e2e ms", "reduce ms", "GB", "same top", "KL")
NOTES = (
    "same top and KL: how often the likeliest token is the same, and how far what is expected is "
    "off (nats), over the first 32 positions of the answer that all tokens give, each model led "
    "along it",
    "ttft: vision encoder + prefill; reduce: choosing the tokens, a part of e2e alone",
)
RANDOM = (
    "the weights are random: how far such answers agree says little of a trained model; times and "
    "memory hold"
)


def table(points: Sequence[Record], random: bool, width: int = 80) -> str:
    """A line for each point, and how to read it."""
    scored = any("accuracy" in point for point in points)
    rows = [(*HEAD, "right") if scored else HEAD, *(_cells(point, scored) for point in points)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(room) if column == 1 else cell.rjust(room)
            for column, (cell, room) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    notes = [*NOTES, *([RANDOM] if random else [])]
    if scored:
        notes.append("right: the demo model's questions about freshly drawn scenes, exact matches")
    told = [textwrap.fill(note, width, subsequent_indent="  ") for note in notes]
    return "\n".join([*lines, "", *told])


def _cells(point: Record, scored: bool) -> tuple[str, ...]:
    figures = point["figures"]
    reduce = figures.get("stage: reduce")
    cells = (
        f"{point['visual_tokens']:,}",
        point["label"],
        f"{figures['ttft']['median'] * 1000:,.1f}",
        f"{figures['ttft_e2e']['median'] * 1000:,.1f}",
        "-" if reduce is None else f"{reduce['median'] * 1000:,.2f}",
        f"{figures['peak_memory']['median']:,.3f}",
        f"{point['top1']:.0%}",
        f"{point['kl']:.3f}",
    )
    return (*cells, f"{point['accuracy']['all']:.0%}") if scored else cells


def page(record: Record) -> str:
    """A page of its own: agreement and time over the number of visual tokens."""
    points, random = record["points"], record["weights"] != "checkpoint"
    title = f"{record['model']}: fewer visual tokens"
    drawn = [
        ("Likeliest token as with all visual tokens, %", lambda point: 100 * point["top1"]),
        ("Time to first token (vision encoder + prefill), ms",
         lambda point: 1000 * point["figures"]["ttft"]["median"]),
    ]  # fmt: skip
    if any("accuracy" in point for point in points):
        drawn.append(
            ("Questions answered rightly, %", lambda point: 100 * point["accuracy"]["all"])
        )
    figures = [
        f"<figure><figcaption>{escape(name)}</figcaption>{_plot(points, name, value)}</figure>"
        for name, value in drawn
    ]
    notes = "".join(
        f"<p class=soft>{escape(note)}</p>" for note in (NOTES[0], *([RANDOM] * random))
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(figures) + f"\n{notes}</body></html>\n"
    )


def _plot(points: Sequence[Record], name: str, value: Any) -> str:
    names = series(points)
    lines = []
    for index, way in enumerate(names):
        own = [point for point in points if point["way"] in (way, WHOLE)]
        own.sort(key=lambda point: int(point["visual_tokens"]))
        lines.append(
            [Point(p["visual_tokens"], value(p), index, kind="here", title=p["label"]) for p in own]
        )
    marks = [point for line in lines for point in line]
    return scatter(marks, names, name, "", lines, x_log=False, x_name="visual tokens")
