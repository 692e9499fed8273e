"""A scene and the same scene with one thing changed, for "What has changed?"."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import colours
import draw
import texts
from draw import SHAPES, Mark, Scene

MOST = 6  # characters of a text that changes
NOTHING = "Nothing has changed."
ASKED = (
    "What has changed?", "What changed?", "What is different?", "What is the difference?",
    "What has changed between the two pictures?", "Compare the two pictures.",
)  # fmt: skip


def recoloured(rng: Random, name: str, other: colours.RGB) -> tuple[str, colours.RGB]:
    """Another named colour, well apart from what it lies beside."""
    while True:
        new, rgb = colours.sample(rng)
        if new and new != name and math.dist(rgb, other) >= colours.CONTRAST:
            return new, rgb


def rewritten(scene: Scene, rng: Random) -> Scene:
    """Another text of the same length in the same place."""
    line = scene.lines[0]
    text = texts.string(rng, len(line.text.replace(" ", "")))
    return replace(scene, text=text, lines=(replace(line, text=text),))


def change(scene: Scene, rng: Random) -> tuple[Scene, str]:
    """The changed scene, and what has changed."""
    kinds = ["colour", "nothing", "nothing"] + ["background"] * (scene.look.backdrop == "plain")
    kinds += ["text", "text"] * (len(scene.lines) == 1) + ["shape"] * bool(scene.shape)
    kinds += ["count", "count"] * (scene.count > 1)
    kind = rng.choice(kinds)
    if kind == "colour" and scene.colour:
        name, rgb = recoloured(rng, scene.colour, scene.background_rgb)
        said = f"The color has changed from {scene.colour} to {name}."
        return replace(scene, colour=name, colour_rgb=rgb), said
    if kind == "background" and scene.background:
        name, rgb = recoloured(rng, scene.background, scene.colour_rgb)
        said = f"The background has changed from {scene.background} to {name}."
        return replace(scene, background=name, background_rgb=rgb), said
    if kind == "text":
        other = rewritten(scene, rng)
        if other.text != scene.text:
            return other, f'The text has changed from "{scene.text}" to "{other.text}".'
    if kind == "shape":
        shape = rng.choice([name for name in SHAPES if name != scene.shape])
        marks = tuple(Mark(shape, mark.box) for mark in scene.marks)
        said = f"The shape has changed from {scene.shape} to {shape}."
        return replace(scene, shape=shape, marks=marks), said
    if kind == "count":
        left = rng.randrange(1, scene.count)
        said = f"The number has changed from {scene.count} to {left}."
        return replace(scene, marks=scene.marks[:left]), said
    return scene, NOTHING


def pair(seed: str) -> tuple[Scene, Scene, str]:
    """Two scenes, and what has changed from the first to the second."""
    rng = Random(seed)
    kind = rng.choice(("text", "shapes", "position"))
    one = draw.text_scene(rng, most=MOST) if kind == "text" else draw.MAKERS[kind](rng)
    other, said = change(one, rng)
    return one, other, said
