"""Draw the sample pictures of examples/images: python examples/demo_model/samples.py FOLDER"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

from plain import COLOURS, Scene, draw, position_scene, shapes_scene, text_scene


def paint(scene: Scene, colour: str, background: str) -> Scene:
    """The scene in two named colours."""
    return replace(
        scene, colour=colour, background=background,
        colour_rgb=COLOURS[colour], background_rgb=COLOURS[background],
    )  # fmt: skip


def find(make: str, **wanted: object) -> Scene:
    """The first held-out scene whose attributes are as wanted."""
    makers = {"shapes": shapes_scene, "position": position_scene}
    seed = 0
    while True:
        scene = makers[make](Random(f"samples-{seed}"))
        if all(getattr(scene, name) == value for name, value in wanted.items()):
            return scene
        seed += 1


def samples() -> dict[str, Scene]:
    """File name -> scene."""
    return {
        "text.png": paint(text_scene(Random("samples-text"), "K7QX"), "black", "white"),
        "hello.png": paint(text_scene(Random("samples-hello"), "HELLO"), "yellow", "blue"),
        "shapes.png": paint(find("shapes", shape="circle", count=3), "red", "blue"),
        "count.png": paint(find("shapes", shape="triangle", count=6), "purple", "yellow"),
        "position.png": paint(find("position", shape="star", place="left"), "green", "white"),
        "top.png": paint(find("position", shape="cross", place="top"), "orange", "black"),
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "examples/images")
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in samples().items():
        draw(scene, 512).save(folder / name, optimize=True)


if __name__ == "__main__":
    main()
