"""A scene and the same scene with one thing changed, for "What has changed?"."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Change:
    """What has changed, and from what to what; `what` is empty where nothing has."""

    what: str = ""
    before: str = ""
    after: str = ""

    @property
    def said(self) -> str:
        quote = '"' if self.what == "text" else ""
        before, after = (f"{quote}{one}{quote}" for one in (self.before, self.after))
        return f"The {self.what} has changed from {before} to {after}." if self.what else NOTHING

    @property
    def undone(self) -> Change:
        """The change from the second picture to the first."""
        return Change(self.what, self.after, self.before)


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


def change(scene: Scene, rng: Random) -> tuple[Scene, Change]:
    """The changed scene, and what has changed."""
    kinds = ["colour", "nothing", "nothing"] + ["background"] * (scene.look.backdrop == "plain")
    kinds += ["text", "text"] * (len(scene.lines) == 1) + ["shape"] * bool(scene.shape)
    kinds += ["count", "count"] * (scene.count > 1)
    kind = rng.choice(kinds)
    if kind == "colour" and scene.colour:
        name, rgb = recoloured(rng, scene.colour, scene.background_rgb)
        return replace(scene, colour=name, colour_rgb=rgb), Change("color", scene.colour, name)
    if kind == "background" and scene.background:
        name, rgb = recoloured(rng, scene.background, scene.colour_rgb)
        told = Change("background", scene.background, name)
        return replace(scene, background=name, background_rgb=rgb), told
    if kind == "text":
        other = rewritten(scene, rng)
        if other.text != scene.text:
            return other, Change("text", scene.text, other.text)
    if kind == "shape":
        shape = rng.choice([name for name in SHAPES if name != scene.shape])
        marks = tuple(Mark(shape, mark.box) for mark in scene.marks)
        return replace(scene, shape=shape, marks=marks), Change("shape", scene.shape, shape)
    if kind == "count":
        left = rng.randrange(1, scene.count)
        told = Change("number", str(scene.count), str(left))
        return replace(scene, marks=scene.marks[:left]), told
    return scene, Change()


def pair(seed: str, changed: bool = False) -> tuple[Scene, Scene, Change]:
    """Two scenes, and what has changed from the first to the second; `changed`: something has."""
    rng = Random(seed)
    while True:
        kind = rng.choice(("text", "shapes", "position"))
        one = draw.text_scene(rng, most=MOST) if kind == "text" else draw.MAKERS[kind](rng)
        other, told = change(one, rng)
        if told.what or not changed:
            return one, other, told
