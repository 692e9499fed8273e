"""The demo model's question sets -> the share that it answers rightly.

Scenes are drawn as its training draws them (examples/demo_model), which is there in a checkout.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[3] / "examples" / "demo_model"
SCENES, SIDE, NAME = 8, 256, "curve"
TOKENS = 40
Answer = Callable[[Any, str], str]


def available() -> bool:
    return (FOLDER / "evaluate.py").is_file()


def accuracy(answer: Answer, scenes: int = SCENES) -> dict[str, float]:
    """Share of right answers by category, "all" among them, of so many scenes each."""
    with _importable():
        evaluate = import_module("evaluate")
        asked, draw = import_module("questions"), import_module("draw").draw
        shares: dict[str, float] = {}
        for category in asked.CATEGORIES:
            right = 0
            for index in range(scenes):
                scene = evaluate.drawn(category, index, NAME)
                question = asked.phrase(category, scene, Random(f"{NAME}-{category}-{index}"))
                expected = asked.answers(scene)[category]
                right += answer(draw(scene, SIDE), question).strip() == expected
            shares[category] = right / scenes
    return shares | {"all": sum(shares.values()) / len(shares)}


@contextmanager
def _importable() -> "Iterator[None]":
    """Those files import each other by their names alone."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
