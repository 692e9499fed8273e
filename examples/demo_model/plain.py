"""Scenes of the demo model: a seed gives a scene, a scene gives a picture and its answers.

A scene is printed text, or one to six equal shapes, in one colour on a plain background.
Coordinates and sizes are fractions of the side, so that a scene can be drawn at any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"
COLOURS = {
    "red": (215, 35, 40),
    "green": (35, 150, 60),
    "blue": (40, 70, 205),
    "yellow": (245, 215, 45),
    "orange": (245, 130, 25),
    "purple": (130, 45, 160),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("left", "right", "top", "bottom", "center")
MIDDLES = {3: "left", 5: "right", 1: "top", 7: "bottom", 4: "center"}  # cells of the 3 x 3 grid
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
MAX_TEXT = 6
MAX_COUNT = 6
CONTRAST = 130  # least distance of colour and background, RGB units
TEXT_CONTRAST = 60  # least difference in luminance of text and background
COLOUR_JITTER = 20
KINDS = ("text", "shapes", "position")
LENGTHS = (1, 1.5, 2, 3, 4, 4)  # how often a reading scene has 1 ... 6 characters

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """One glyph or shape: what it is and its box (left, top, right, bottom)."""

    label: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `place` is empty where the position is not a fair question."""

    kind: str
    colour: str
    background: str
    colour_rgb: tuple[int, int, int]
    background_rgb: tuple[int, int, int]
    marks: tuple[Mark, ...]
    shape: str = ""
    place: str = ""
    text: str = ""
    font: int = 0
    em: float = 0.0
    angle: float = 0.0

    @property
    def count(self) -> int:
        return len(self.marks) if self.shape else 0


@cache
def font_files() -> tuple[str, ...]:
    """Paths of the fonts; the empty name is Pillow's own (Aileron)."""
    from font_hanken_grotesk import HankenGroteskBold, HankenGroteskSemiBold
    from font_roboto import RobotoBold, RobotoMedium
    from font_source_sans_pro import SourceSansProBold, SourceSansProSemibold

    return (
        "", RobotoMedium, RobotoBold, SourceSansProSemibold, SourceSansProBold,
        HankenGroteskSemiBold, HankenGroteskBold,
    )  # fmt: skip


@cache
def font(index: int, pixels: int) -> ImageFont.FreeTypeFont:
    path = font_files()[index]
    if not path:
        face = ImageFont.load_default(pixels)
        assert isinstance(face, ImageFont.FreeTypeFont)
        return face
    return ImageFont.truetype(path, pixels)


def _jitter(rgb: tuple[int, int, int], rng: Random) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for c in rgb)
    return r, g, b


def _luminance(rgb: tuple[int, int, int]) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def _colours(rng: Random, least: float = 0.0) -> dict[str, object]:
    """A colour and a background that can be told apart."""
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        one, other = COLOURS[colour], COLOURS[background]
        contrast = abs(_luminance(one) - _luminance(other))
        if math.dist(one, other) >= CONTRAST and contrast >= least:
            return {
                "colour": colour,
                "background": background,
                "colour_rgb": _jitter(COLOURS[colour], rng),
                "background_rgb": _jitter(COLOURS[background], rng),
            }


def text_scene(rng: Random, text: str = "", length: int = 0) -> Scene:
    """`text` (or `length` random characters) near the middle, on one line."""
    length = length or rng.randint(1, MAX_TEXT)
    text = text or "".join(rng.choices(ALPHABET, k=length))
    index = rng.randrange(len(font_files()))
    face, tracking = font(index, 200), rng.uniform(0.0, 0.08)
    widths = [face.getlength(c) / 200 + tracking for c in text]
    em = min(rng.uniform(0.22, 0.28), 0.93 / sum(widths))
    slack = (0.96 - em * sum(widths)) / 2
    x = 0.5 - em * (sum(widths) - tracking) / 2 + min(slack, 0.05) * rng.uniform(-1, 1)
    height = em * (face.getbbox("H", anchor="ls")[3] - face.getbbox("H", anchor="ls")[1]) / 200
    base = 0.5 + height / 2 + rng.uniform(-0.1, 0.1)
    marks = []
    for char, width in zip(text, widths, strict=True):
        marks.append(Mark(char, (x, base - height, x + em * (width - tracking), base)))
        x += em * width
    colours = _colours(rng, TEXT_CONTRAST)
    return Scene("text", marks=tuple(marks), text=text, font=index, em=em, **colours)  # type: ignore[arg-type]


def _square(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def shapes_scene(rng: Random, count: int = 0) -> Scene:
    """One to six equal shapes in different cells of a 3 x 3 grid."""
    count = count or rng.randint(1, MAX_COUNT)
    shape = rng.choice(SHAPES)
    radius = rng.uniform(0.075, 0.125)
    marks = []
    chosen = rng.sample(range(9), count)
    for cell in chosen:
        free = 1 / 6 - radius - 0.012
        x = (cell % 3 + 0.5) / 3 + rng.uniform(-free, free)
        y = (cell // 3 + 0.5) / 3 + rng.uniform(-free, free)
        marks.append(Mark(shape, _square(x, y, radius)))
    place = MIDDLES.get(chosen[0], "") if count == 1 else ""
    return Scene(
        "shapes", marks=tuple(marks), shape=shape, place=place,
        angle=rng.uniform(-8, 8), **_colours(rng),  # type: ignore[arg-type]
    )  # fmt: skip


def position_scene(rng: Random) -> Scene:
    """One shape at the left, right, top or bottom, or in the center."""
    shape, place = rng.choice(SHAPES), rng.choice(PLACES)
    radius = rng.uniform(0.09, 0.17)
    x, y = 0.5 + rng.uniform(-0.07, 0.07), 0.5 + rng.uniform(-0.07, 0.07)
    edge = radius + rng.uniform(0.03, 0.11)
    x = {"left": edge, "right": 1 - edge}.get(place, x)
    y = {"top": edge, "bottom": 1 - edge}.get(place, y)
    marks = (Mark(shape, _square(x, y, radius)),)
    angle = rng.uniform(-8, 8)
    return Scene("position", marks=marks, shape=shape, place=place, angle=angle, **_colours(rng))  # type: ignore[arg-type]


def scene(seed: int | str, kind: str = "") -> Scene:
    """The scene of a seed; `kind` is one of KINDS, or drawn (half of the scenes are text)."""
    rng = Random(seed)
    kind = kind or rng.choices(KINDS, (0.55, 0.27, 0.18))[0]
    makers = {"text": text_scene, "shapes": shapes_scene, "position": position_scene}
    return makers[kind](rng)


def reading_scene(seed: int | str) -> Scene:
    """The scene of a seed of the training: mostly text, and mostly long."""
    rng = Random(seed)
    if rng.random() < 0.72:
        return text_scene(rng, length=rng.choices(range(1, MAX_TEXT + 1), LENGTHS)[0])
    return scene(f"{seed}-o", rng.choice(KINDS[1:]))


def outline(shape: str) -> list[tuple[float, float]]:
    """Corner points of a shape in the unit circle, y downwards."""
    turn = [math.tau * k / 60 - math.pi / 2 for k in range(60)]
    point = [(math.cos(a), math.sin(a)) for a in turn]
    if shape == "triangle":
        return [(x, y + 0.15) for x, y in (point[0], point[20], point[40])]
    if shape == "star":
        rings = [(point[6 * k], 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return [(x * r, y * r) for (x, y), r in rings]
    if shape == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape == "cross":
        a, b = 0.3, 0.95
        return [
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
        ]  # fmt: skip
    return [(0.92 * x, 0.92 * y) for x, y in point]


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """The picture of a scene, RGB, size x size pixels, with smooth edges."""
    if scene.text:
        image = Image.new("RGB", (size, size), scene.background_rgb)
        pen, face = ImageDraw.Draw(image), font(scene.font, max(1, round(scene.em * size)))
        for mark in scene.marks:
            place = mark.box[0] * size, mark.box[3] * size
            pen.text(place, mark.label, font=face, fill=scene.colour_rgb, anchor="ls")
        return image
    image = Image.new("RGB", (2 * size, 2 * size), scene.background_rgb)
    pen = ImageDraw.Draw(image)
    cos, sin = math.cos(math.radians(scene.angle)), math.sin(math.radians(scene.angle))
    for mark in scene.marks:
        left, top, right, bottom = mark.box
        x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
        corners = [
            (2 * size * (x + radius * (u * cos - v * sin)),
             2 * size * (y + radius * (u * sin + v * cos)))
            for u, v in outline(mark.label)
        ]  # fmt: skip
        pen.polygon(corners, fill=scene.colour_rgb)
    return image.resize((size, size), Image.Resampling.BOX)
