"""Scenes of the demo model: seed -> scene; render.py draws it, questions.py asks about it.

A scene is printed text, one to nine equal shapes, a page of small print, or something unknown.
Coordinates and sizes are fractions of the longer side, from the picture's upper left corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import colours
import fonts
import texts
from colours import RGB

SHAPES = ("circle", "square", "triangle", "star", "cross", "rectangle")
PLACES = ("left", "right", "top", "bottom", "center")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_COUNT = 9
KINDS = ("text", "shapes", "position", "unknown")
MIX = {"text": 0.2, "page": 0.7, "shapes": 0.05, "position": 0.01, "unknown": 0.04}
ASKED_MIX = {"text": 0.5, "shapes": 0.27, "position": 0.08, "unknown": 0.15}
LENGTHS = (1.0, 1.0, 1.3, 1.5, 1.7, 2.0, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4)  # 1 ... 12 characters
LEAST_EM = 0.055  # smaller print has under 20 pixels to a capital in the model's 512
LEAST_PRINT, LARGEST_PRINT = 0.07, 0.3  # ems of a page
SIDE_EM = 200  # pixels per em at which texts are measured

Box = tuple[float, float, float, float]
Corners = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """One glyph or shape: what it is, its box (left, top, right, bottom), its place in the text."""

    label: str
    box: Box
    number: int = 0


@dataclass(frozen=True)
class Line:
    """One line of text: its face, size, and where its baseline begins."""

    text: str
    font: str
    em: float
    x: float
    base: float


@dataclass(frozen=True)
class Look:
    """How a scene is drawn; `warp` holds where the picture's four corners go."""

    backdrop: str = "plain"  # plain, gradient, photo
    fade: RGB = (0, 0, 0)
    warp: tuple[float, ...] = ()
    smooth: bool = True
    outline: float = 0.0  # width of an outlined shape, in radii; 0: filled
    border: RGB | None = None
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `place` is empty where the position is not a fair question."""

    kind: str
    colour: str
    background: str
    colour_rgb: RGB
    background_rgb: RGB
    marks: tuple[Mark, ...]
    shape: str = ""
    place: str = ""
    text: str = ""
    lines: tuple[Line, ...] = ()
    angle: float = 0.0
    width: float = 1.0
    height: float = 1.0
    look: Look = field(default_factory=Look)

    @property
    def count(self) -> int:
        return len(self.marks) if self.shape else 0


def homography(corners: Corners) -> tuple[float, ...]:
    """Eight coefficients that take the unit square's corners to `corners` (clockwise from 0, 0)."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners
    dx1, dx2, sx = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, sy = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    det = dx1 * dy2 - dx2 * dy1
    g, h = (sx * dy2 - dx2 * sy) / det, (dx1 * sy - sx * dy1) / det
    return x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h


def apply(h: tuple[float, ...], x: float, y: float) -> tuple[float, float]:
    w = h[6] * x + h[7] * y + 1
    return (h[0] * x + h[1] * y + h[2]) / w, (h[3] * x + h[4] * y + h[5]) / w


def warp(rng: Random, width: float, height: float) -> tuple[float, ...]:
    """Slight rotation and perspective about the middle: the four corners' new places."""
    turn = math.radians(rng.gauss(0, 5))
    cos, sin = math.cos(turn), math.sin(turn)
    lean = 0.06 if rng.random() < 0.5 else 0.0
    corners = []
    for u, v in ((0, 0), (1, 0), (1, 1), (0, 1)):
        x, y = (u - 0.5) * width, (v - 0.5) * height
        x, y = x * cos - y * sin, x * sin + y * cos
        corners += [
            x + width / 2 + rng.uniform(-lean, lean),
            y + height / 2 + rng.uniform(-lean, lean),
        ]
    return tuple(corners)


def moved(marks: Sequence[Mark], look: Look, width: float, height: float) -> tuple[Mark, ...]:
    """The marks where the warp takes them."""
    if not look.warp:
        return tuple(marks)
    h = homography(list(zip(look.warp[::2], look.warp[1::2], strict=True)))
    result = []
    for mark in marks:
        left, top, right, bottom = mark.box
        box_corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        points = [apply(h, x / width, y / height) for x, y in box_corners]
        xs, ys = sorted(x for x, _ in points), sorted(y for _, y in points)
        box = ((xs[0] + xs[1]) / 2, (ys[0] + ys[1]) / 2, (xs[2] + xs[3]) / 2, (ys[2] + ys[3]) / 2)
        result.append(Mark(mark.label, box, mark.number))
    return tuple(result)


def look(rng: Random, text: bool, width: float, height: float) -> Look:
    """How to draw: plain and clean more than half of the time."""
    seed = rng.getrandbits(31)
    warped = warp(rng, width, height) if text and rng.random() < 0.2 else ()
    if rng.random() < 0.55:
        return Look(warp=warped, seed=seed, smooth=rng.random() > 0.08)
    backdrop = rng.choices(("plain", "gradient", "photo"), (6, 1.6, 1.6 if text else 0.3))[0]
    return Look(
        backdrop, warp=warped, seed=seed,
        smooth=rng.random() > 0.12,
        outline=rng.uniform(0.12, 0.3) if not text and rng.random() < 0.3 else 0.0,
        border=(0, 0, 0) if not text and rng.random() < 0.2 else None,
        blur=rng.uniform(0.2, 0.8) if rng.random() < 0.2 else 0.0,
        noise=rng.uniform(2, 14) if rng.random() < 0.25 else 0.0,
        jpeg=rng.randint(30, 92) if rng.random() < 0.3 else 0,
    )  # fmt: skip


def extent(rng: Random) -> tuple[float, float]:
    """Width and height: square half of the time, landscape more often than portrait."""
    draw = rng.random()
    if draw < 0.5:
        return 1.0, 1.0
    other = rng.uniform(0.5, 0.95)
    return (1.0, other) if draw < 0.85 else (other, 1.0)


def line_marks(line: Line, first: int) -> list[Mark]:
    """The characters of a line, numbered from `first`; spaces count but are no marks."""
    face, scale = fonts.face(line.font, SIDE_EM), line.em / SIDE_EM
    marks = []
    for i, char in enumerate(line.text):
        if char == " ":
            continue
        x0, x1 = face.getlength(line.text[:i]), face.getlength(line.text[: i + 1])
        box = face.getbbox(char, anchor="ls")
        top, bottom = line.base + scale * box[1], line.base + scale * box[3]
        marks.append(Mark(char, (line.x + scale * x0, top, line.x + scale * x1, bottom), first + i))
    return marks


def broken(text: str, rng: Random) -> list[str]:
    """The text in one or two lines."""
    words = text.split(" ")
    if len(words) > 1 and rng.random() < 0.55:
        cut = rng.randrange(1, len(words))
        return [" ".join(words[:cut]), " ".join(words[cut:])]
    return [text]


def layout(
    rng: Random, rows: list[str], font: str, width: float, height: float, least: float = LEAST_EM
) -> tuple[Line, ...]:
    """The rows at a size and place where they fit the picture."""
    face = fonts.face(font, SIDE_EM)
    boxes = [face.getbbox(row, anchor="ls") for row in rows]
    spacing = rng.uniform(1.05, 1.4)
    wide = max(box[2] - min(0, box[0]) for box in boxes) / SIDE_EM
    ascent, descent = (
        -min(box[1] for box in boxes) / SIDE_EM,
        max(box[3] for box in boxes) / SIDE_EM,
    )
    tall = ascent + max(0.0, descent) + spacing * (len(rows) - 1)
    most = 0.97 * min(width / wide, height / tall)
    if rng.random() < 0.75:
        em = most * rng.uniform(0.5, 1.0)
    else:
        em = math.exp(rng.uniform(math.log(least), math.log(0.8)))
    em = min(em, most, 0.85)
    free_x, free_y = width - em * wide, height - em * tall
    x, y = rng.uniform(0, free_x), rng.uniform(0, free_y)
    style = rng.random()
    if style < 0.3:
        x, y = free_x / 2, free_y / 2
    elif style < 0.5:
        x = min(free_x, rng.uniform(0.01, 0.1))
    align = rng.choice((0.0, 0.5, 0.5, 1.0)) if len(rows) > 1 else 0.0
    base, lines = y + em * ascent, []
    for row, box in zip(rows, boxes, strict=True):
        slack = em * (wide - (box[2] - min(0, box[0])) / SIDE_EM)
        start = x + align * slack - em * min(0, box[0]) / SIDE_EM
        lines.append(Line(row, font, em, start, base))
        base += em * spacing
    return tuple(lines)


def text_scene(
    rng: Random, text: str = "", most: int = texts.MAX_TEXT, held_out: bool = False
) -> Scene:
    """`text` (or up to `most` random characters) anywhere, on one or two lines."""
    length = rng.choices(range(1, most + 1), LENGTHS[:most])[0]
    text = text or texts.string(rng, length, held_out)
    for _ in range(8):
        width, height = extent(rng)
        font = fonts.choose(rng.getrandbits(24))
        lines = layout(rng, broken(text, rng), font, width, height)
        if lines[0].em > LEAST_EM:
            break
    style = look(rng, True, width, height)
    marks, number = [], 1
    for line in lines:
        marks += line_marks(line, number)
        number += len(line.text) + 1
    return _painted(rng, "text", moved(marks, style, width, height), style, colours.TEXT_CONTRAST,
                    text=text, lines=lines, width=width, height=height)  # fmt: skip


def _painted(
    rng: Random, kind: str, marks: tuple[Mark, ...], style: Look, least: float, **rest: object
) -> Scene:
    """The scene in two colours; a background that is no single colour has no name."""
    (colour, rgb), (background, ground) = colours.pair(rng, least)
    if style.backdrop == "gradient":
        near, far = colours.jitter(ground, rng), colours.sample(rng)[1]
        share = rng.uniform(0.15, 0.5) if abs(
            colours.luminance(far) - colours.luminance(rgb)) > 70 else 0.1  # fmt: skip
        fade = tuple(round(a + share * (b - a)) for a, b in zip(near, far, strict=True))
        style = Look(**(vars(style) | {"fade": fade}))
        background = background if colours.name(fade) == background else ""  # type: ignore[arg-type]
    elif style.backdrop == "photo":
        background = ""
    if style.border is not None:
        edge = (0, 0, 0) if colours.luminance(rgb) > 80 else (255, 255, 255)
        style = Look(**(vars(style) | {"border": edge}))
    return Scene(kind, colour, background, rgb, ground, marks, look=style, **rest)  # type: ignore[arg-type]


def page_scene(rng: Random) -> Scene:
    """Several lines of print, to teach the tower what characters look like; asked nothing."""
    width, height = extent(rng)
    em, font, base = 0.0, "", 0.0
    lines: list[Line] = []
    marks: list[Mark] = []
    number = 1
    while True:
        if not font or rng.random() < 0.4:
            font = fonts.choose(rng.getrandbits(24))
            em = math.exp(rng.uniform(math.log(LEAST_PRINT), math.log(LARGEST_PRINT)))
        base += em * rng.uniform(1.0, 1.5)
        if base > height - 0.2 * em:
            break
        x, row = rng.uniform(0.0, 0.08), ""
        face = fonts.face(font, SIDE_EM)
        misses = 0
        while misses < 3:
            word = texts.piece(rng, rng.randint(1, 8))
            longer = f"{row} {word}" if row else word
            if x + em * face.getlength(longer) / SIDE_EM > width - 0.01:
                misses += 1
            else:
                row = longer
        line = Line(row, font, em, x, base)
        lines.append(line)
        marks += line_marks(line, number)
        number += len(row) + 1
    style = look(rng, True, width, height)
    return _painted(rng, "page", moved(marks, style, width, height), style, colours.TEXT_CONTRAST,
                    lines=tuple(lines), width=width, height=height)  # fmt: skip


def _square(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def place_of(x: float, y: float, width: float, height: float) -> str:
    """Where a point is: one of PLACES, or empty between them."""
    dx, dy = x / width - 0.5, y / height - 0.5
    if max(abs(dx), abs(dy)) < 0.09:
        return "center"
    if max(abs(dx), abs(dy)) < 0.15 or not (abs(dx) > 2 * abs(dy) or abs(dy) > 2 * abs(dx)):
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def shapes_scene(rng: Random, count: int = 0) -> Scene:
    """One to nine equal shapes anywhere, sometimes of unequal size or touching."""
    count = count or rng.choices(range(1, MAX_COUNT + 1), (1.6, 1, 1, 1, 1, 1.2, 1.5, 1.7, 1.7))[0]
    shape = rng.choice(SHAPES)
    width, height = extent(rng)
    largest = min(0.42 * min(width, height), 0.44 * math.sqrt(width * height / count))
    largest = min(largest, 0.2) if count > 1 else largest
    radius, unequal = rng.uniform(0.05, max(0.07, largest)), rng.random() < 0.3
    gap = -0.12 if rng.random() < 0.15 and count < 5 else 0.02
    marks: list[Mark] = []
    tries = 0
    while len(marks) < count:
        r = radius * rng.uniform(0.7, 1.0) if unequal else radius
        x, y = rng.uniform(r, width - r), rng.uniform(r, height - r)
        near = (math.hypot(x - (m.box[0] + m.box[2]) / 2, y - (m.box[1] + m.box[3]) / 2)
                - (m.box[2] - m.box[0]) / 2 - r for m in marks)  # fmt: skip
        if all(distance > gap * (1 if gap > 0 else 2 * r) for distance in near):
            marks.append(Mark(shape, _square(x, y, r)))
        tries += 1
        if tries % 60 == 0:
            marks, radius = [], radius * 0.88
    place = ""
    if count == 1:
        left, top, right, bottom = marks[0].box
        place = place_of((left + right) / 2, (top + bottom) / 2, width, height)
    return _painted(rng, "shapes", tuple(marks), look(rng, False, width, height), 0.0, shape=shape,
                    place=place, width=width, height=height, angle=turn(rng))  # fmt: skip


def turn(rng: Random) -> float:
    """Degrees; small enough for a square to stay one."""
    return 0.0 if rng.random() < 0.4 else rng.uniform(-12, 12)


def position_scene(rng: Random) -> Scene:
    """One shape at the left, right, top or bottom, or in the center."""
    shape, place = rng.choice(SHAPES), rng.choice(PLACES)
    width, height = extent(rng)
    radius = rng.uniform(0.07, 0.2) * min(width, height)
    x, y = width * (0.5 + rng.uniform(-0.07, 0.07)), height * (0.5 + rng.uniform(-0.07, 0.07))
    edge = radius + rng.uniform(0.0, 0.11)
    x = {"left": edge, "right": width - edge}.get(place, x)
    y = {"top": edge, "bottom": height - edge}.get(place, y)
    marks = (Mark(shape, _square(x, y, radius)),)
    return _painted(rng, "position", marks, look(rng, False, width, height), 0.0, shape=shape,
                    place=place_of(x, y, width, height), width=width, height=height,
                    angle=turn(rng))  # fmt: skip


def unknown_scene(rng: Random) -> Scene:
    """Something that the model must decline."""
    width, height = extent(rng)
    style = Look("unknown", seed=rng.getrandbits(31), jpeg=rng.choice((0, 0, 60)))
    return Scene(
        "unknown", "", "", (0, 0, 0), (0, 0, 0), (), look=style, width=width, height=height
    )


MAKERS = {
    "text": text_scene, "shapes": shapes_scene, "position": position_scene, "page": page_scene,
    "unknown": unknown_scene,
}  # fmt: skip


def scene(seed: int | str, kind: str = "") -> Scene:
    """The scene of a seed; `kind` is one of MIX, or drawn by its shares."""
    rng = Random(seed)
    kind = kind or rng.choices(list(MIX), list(MIX.values()))[0]
    return MAKERS[kind](rng)


def asked_scene(seed: int | str) -> Scene:
    """The scene of a seed, never a page, and less often a text."""
    rng = Random(seed)
    kind = rng.choices(list(ASKED_MIX), list(ASKED_MIX.values()))[0]
    return MAKERS[kind](rng)
