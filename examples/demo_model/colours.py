"""Colours that have a name, and pairs of them that can be told apart."""

from __future__ import annotations

import math
from random import Random

RGB = tuple[int, int, int]

# Name -> what people draw when they mean it; the first is the usual one.
COLOURS: dict[str, tuple[RGB, ...]] = {
    "red": ((215, 35, 40), (255, 0, 0), (200, 20, 30), (230, 60, 60), (170, 10, 20)),
    "green": ((35, 150, 60), (0, 128, 0), (0, 255, 0), (50, 205, 50), (20, 100, 40)),
    "blue": ((40, 70, 205), (0, 0, 255), (30, 60, 160), (65, 105, 225), (0, 0, 128)),
    "yellow": ((245, 215, 45), (255, 255, 0), (255, 220, 0), (250, 235, 80)),
    "orange": ((245, 130, 25), (255, 165, 0), (255, 140, 0), (240, 110, 20)),
    "purple": ((130, 45, 160), (128, 0, 128), (110, 30, 150), (150, 60, 190)),
    "black": ((15, 15, 15), (0, 0, 0), (0, 0, 0), (30, 30, 30)),
    "white": ((245, 245, 245), (255, 255, 255), (255, 255, 255), (235, 235, 235)),
    "gray": ((128, 128, 128), (150, 150, 150), (110, 110, 110), (169, 169, 169)),
    "brown": ((130, 75, 35), (165, 42, 42), (139, 69, 19), (110, 60, 30)),
    "pink": ((250, 150, 185), (255, 192, 203), (255, 105, 180), (245, 130, 170)),
    "teal": ((20, 130, 130), (0, 128, 128), (0, 110, 115), (30, 150, 150)),
}
CONTRAST = 130  # least distance of colour and background, RGB units
TEXT_CONTRAST = 60  # least difference in luminance of text and background
JITTER = 22


def jitter(rgb: RGB, rng: Random) -> RGB:
    r, g, b = (min(255, max(0, c + rng.randint(-JITTER, JITTER))) for c in rgb)
    return r, g, b


def luminance(rgb: RGB) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def clearly(rgb: RGB, chosen: str) -> bool:
    """Whether no other name's usual colours come near to being as close as the chosen one's."""
    near = {n: min(math.dist(rgb, anchor) for anchor in COLOURS[n]) for n in COLOURS}
    return all(1.3 * near[chosen] < near[n] for n in COLOURS if n != chosen)


def name(rgb: RGB) -> str:
    """The colour's name; empty where two names would do or none does."""
    near = sorted((min(math.dist(rgb, a) for a in anchors), n) for n, anchors in COLOURS.items())
    return near[0][1] if near[0][0] < 70 and near[1][0] > 1.25 * near[0][0] + 12 else ""


def sample(rng: Random) -> tuple[str, RGB]:
    """A colour with its name (empty: without)."""
    if rng.random() < 0.1:
        r, g, b = (rng.randrange(256) for _ in range(3))
        return name((r, g, b)), (r, g, b)
    chosen = rng.choice(list(COLOURS))
    if rng.random() < 0.25:
        chosen = rng.choice(("black", "white", "white"))
    anchor = rng.choice(COLOURS[chosen])
    rgb = anchor if rng.random() < 0.4 else jitter(anchor, rng)
    return chosen if clearly(rgb, chosen) else "", rgb


def pair(rng: Random, least: float = 0.0) -> tuple[tuple[str, RGB], tuple[str, RGB]]:
    """A colour and a background that can be told apart; `least` difference in luminance."""
    while True:
        one, other = sample(rng), sample(rng)
        if (
            math.dist(one[1], other[1]) >= CONTRAST
            and abs(luminance(one[1]) - luminance(other[1])) >= least
            and (one[0] != other[0] or not one[0])
        ):
            return one, other
