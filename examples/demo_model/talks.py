"""Two pictures and "What has changed?", and talks of three turns: drawings, questions, answers.

The pairs are drawn by changes.py, on seeds that are never trained on and with its fonts; the talks
are about plain drawings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import plain
from changes import ASKED, Change, pair
from PIL import Image
from questions import answers, phrase
from render import draw

SIDE = 256
TURNS = ("first", "second", "third")


@dataclass(frozen=True)
class Talk:
    """Pictures, what is asked about them in turn, the right answers, and the rows they count in."""

    pictures: tuple[Image.Image, ...]
    questions: tuple[str, ...]
    right: tuple[str, ...]
    groups: tuple[str, ...]


def changed_group(told: Change) -> str:
    """The row of a pair."""
    return f"two pictures, {'something' if told.what else 'nothing'} has changed"


def pairs(count: int, name: str) -> Iterator[Talk]:
    """Two pictures each, drawn at one size."""
    for index in range(count):
        seed = f"{name}-changed-{index}"
        one, other, told = pair(seed)
        pictures = draw(one, SIDE), draw(other, SIDE)
        asked = Random(f"{seed}-question").choice(ASKED)
        yield Talk(pictures, (asked,), (told.said,), (changed_group(told),))


def three_turns(count: int, name: str) -> Iterator[Talk]:
    """A plain drawing each, and three questions of different kinds."""
    for index in range(count):
        seed = f"{name}-talk-{index}"
        one, rng = plain.scene(seed), Random(f"{seed}-questions")
        fair = [kind for kind in answers(one) if not kind.startswith("is it")]
        turns = [phrase(kind, one, rng) for kind in rng.sample(fair, len(TURNS))]
        questions, right = zip(*turns, strict=True)
        groups = tuple(f"talk, {turn} answer" for turn in TURNS)
        yield Talk((plain.draw(one, SIDE),), questions, right, groups)


def talks(count: int, name: str) -> Iterator[Talk]:
    yield from pairs(count, name)
    yield from three_turns(count, name)
