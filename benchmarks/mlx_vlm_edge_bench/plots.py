"""Numbers -> SVG drawings as text, for a page that is read on a phone: wide letters, no script.

Colours are the page's CSS variables (--s0 ... --s7 for series), so light and dark both work.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 440  # of the drawing's own units; the page scales it
LETTER = 7.2  # width of one in the plots' font size, 13
SERIES = 8
# Of a page with such drawings: small screens, light and dark.
STYLE = """
:root { color-scheme: light dark; --fg: #1a1d21; --bg: #ffffff; --soft: #5b6570; --line: #d9dee4;
  --card: #f5f7f9; --good: #146c2e; --bad: #a32020;
  --s0: #1f6fd6; --s1: #e07b00; --s2: #2c9a5b; --s3: #b4409b; --s4: #7a828c; --s5: #c2a000;
  --s6: #00869b; --s7: #d4483b; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e9ed; --bg: #14171b; --soft: #a0aab5;
  --line: #39414b; --card: #1d2228; --good: #6fd58c; --bad: #ff8d85; --s0: #5aa2ff; --s1: #ffa53d;
  --s2: #58c98a; --s3: #e07fca; --s4: #98a2ad; --s5: #e3c53f; --s6: #3fbdd2; --s7: #ff7f73; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 960px; color: var(--fg); background: var(--bg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.2em;
  border-top: 1px solid var(--line); padding-top: .8em; } h3 { font-size: 1.05rem; }
p.soft, td .soft, .soft { color: var(--soft); font-size: .9rem; }
figure { margin: 1em 0 1.6em; } figure svg { width: 100%; max-width: 540px; display: block; }
figcaption { font-weight: 600; margin-bottom: .5em; }
svg text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--fg);
  paint-order: stroke; stroke: var(--bg); stroke-width: 3px; }
svg text.strong { font-weight: 600; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; } svg .here { stroke: var(--fg); stroke-width: 2.5; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: .85rem; }
td, th { padding: .45em .6em .45em 0; border-bottom: 1px solid var(--line); vertical-align: top; }
@media (min-width: 641px) { td:first-child { width: 34%; } td { min-width: 5.5em; } }
.tag { font-size: .78rem; border: 1px solid var(--line); border-radius: 1em; padding: .05em .6em;
  white-space: nowrap; } .measured { } .good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; } .tag.quoted { border-style: dashed; }
.tag.estimated { border-style: dotted; }
@media (max-width: 640px) { table, tbody, tr, td { display: block; } thead { display: none; }
  tr { background: var(--card); border-radius: 10px; padding: .6em .8em; margin: 0 0 .7em; }
  td { border: 0; padding: .1em 0; } td:first-child { font-weight: 600; }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); } }
"""
STYLE += "".join(
    f"svg .s{i} {{ fill: var(--s{i}); }} svg .line.s{i} {{ fill: none; stroke: var(--s{i}); }}\n"
    for i in range(SERIES)
)


@dataclass(frozen=True)
class Bar:
    """A stacked bar: its label, its parts by name, and whether it was measured or quoted."""

    label: str
    parts: Mapping[str, float]
    kind: str = "measured"


@dataclass(frozen=True)
class Point:
    """A mark at x, y; `series` chooses the colour, a label is written beside it."""

    x: float
    y: float
    series: int
    label: str = ""
    kind: str = "quoted"
    title: str = ""


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def svg(height: float, parts: Sequence[str], title: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>\n{body}\n</svg>"
    )


def stacked(bars: Sequence[Bar], title: str) -> str:
    """Horizontal bars of milliseconds; each on a line under its label, with the sum behind it."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    longest = max(sum(bar.parts.values()) for bar in bars)
    total = max(len(milliseconds(sum(bar.parts.values()))) for bar in bars) * LETTER + 8
    scale, y, drawn = (WIDTH - total) / longest, 0.0, []
    for bar in bars:
        drawn.append(text(0, y + 14, f"{bar.label}"))
        x = 0.0
        for name, value in bar.parts.items():
            wide = value * scale
            hint = f"<title>{escape(name)}: {milliseconds(value)}</title>"
            colour = f"s{names.index(name) % SERIES} {bar.kind}"
            drawn.append(
                f'<rect x="{x:.2f}" y="{y + 20:.1f}" width="{max(wide, 0.3):.2f}" height="18" '
                f'class="{colour}">{hint}</rect>'
            )
            x += wide
        drawn.append(text(x + 5, y + 34, milliseconds(sum(bar.parts.values())), kind="strong"))
        y += 52
    legend, y = keys(names, y + 4)
    return svg(y, drawn + legend, title)


def keys(names: Sequence[str], y: float) -> tuple[list[str], float]:
    """A legend in as many lines as it takes."""
    drawn, x = [], 0.0
    for index, name in enumerate(names):
        wide = 20 + LETTER * len(name) + 12
        if x and x + wide > WIDTH:
            x, y = 0.0, y + 22
        drawn.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="13" height="13" class="s{index % SERIES}"/>'
        )
        drawn.append(text(x + 18, y + 11.5, name))
        x += wide
    return drawn, y + 20


def ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range: 90, 700 -> [100, 200, 500]."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    steps = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [step for step in steps if least <= step <= most]


def milliseconds(value: float) -> str:
    """116.3 -> "116 ms", 14124 -> "14.1 s", 6.8 -> "6.8 ms"."""
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 20 else f"{value:.1f} ms"


def scatter(
    points: Sequence[Point],
    names: Sequence[str],
    title: str,
    y_name: str,
    lines: Sequence[Sequence[Point]] = (),
    x_log: bool = True,
    x_name: str = "TTFT",
) -> str:
    """Points over a logarithmic axis of milliseconds, or lines over pixels."""
    left, right, top, bottom = 34.0, WIDTH - 12.0, 26.0, 290.0
    xs, ys = [p.x for p in points], [p.y for p in points]
    x_range = (min(xs) / 1.25, max(xs) * 1.25) if x_log else (0.0, max(xs) * 1.1)
    margin = max(1.0, (max(ys) - min(ys)) * 0.1)
    y_range = (min(ys) - margin if x_log else 0.0, max(ys) + margin)

    def at(point: Point) -> tuple[float, float]:
        convert = math.log if x_log else float
        low, high = convert(x_range[0]) if x_log else 0.0, convert(x_range[1])
        across = (convert(point.x) - low) / (high - low)
        up = (point.y - y_range[0]) / (y_range[1] - y_range[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    drawn = axes(at, x_range, y_range, xs, x_log)
    drawn += [text(0, 14, y_name), text(right, bottom + 36, x_name, "end")]
    for line in lines:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, line))
        drawn.append(f'<polyline points="{places}" class="line s{line[0].series}"/>')
    for point in points:
        drawn += mark(*at(point), point, right)
    legend, y = keys(names, bottom + 48)
    return svg(y, drawn + legend, title)


def axes(
    at: Callable[[Point], tuple[float, float]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    xs: Sequence[float],
    x_log: bool,
) -> list[str]:
    """Grid lines with their numbers."""
    drawn = []
    places = ticks(*x_range) if x_log else sorted(set(xs))
    for place in places:
        x, y = at(Point(place, y_range[0], 0))
        drawn.append(f'<line x1="{x:.1f}" y1="26" x2="{x:.1f}" y2="{y:.1f}" class="grid"/>')
        if not x_log or str(place)[0] in "125":
            shown = milliseconds(place) if x_log else f"{place:.0f}"
            drawn.append(text(x, y + 17, shown.replace(".00", "").replace(".0 ", " "), "middle"))
    step = nice((y_range[1] - y_range[0]) / 5)
    place = math.ceil(y_range[0] / step) * step
    while place <= y_range[1]:
        _, y = at(Point(max(x_range[0], 1e-9), place, 0))
        drawn.append(f'<line x1="34" y1="{y:.1f}" x2="{WIDTH - 12}" y2="{y:.1f}" class="grid"/>')
        drawn.append(text(30, y + 4.5, f"{place:g}", "end"))
        place += step
    return drawn


def nice(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten: 13 -> 20."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= value)


def mark(x: float, y: float, point: Point, right: float) -> list[str]:
    """A dot, with a ring around what was measured here."""
    hint = f"<title>{escape(point.title)}</title>"
    colour = f"s{point.series} {point.kind}"
    drawn = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" class="{colour}">{hint}</circle>']
    if point.label:
        end = x + 9 + LETTER * len(point.label) > right
        drawn.append(text(x - 9 if end else x + 9, y + 4.5, point.label, "end" if end else "start"))
    return drawn
