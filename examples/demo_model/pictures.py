"""The pictures of the training: drawn without end, each with its labels and a talk about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import colours
import numpy as np
import plain
import torch
from changes import pair
from draw import Mark, Scene, asked_scene, scene
from language import padded_rows, said_of_pair, talk_row
from PIL import Image
from prompts import Prompter
from render import draw, padded
from torch.utils.data import DataLoader, IterableDataset
from vision import SIDE, labels

SMALLEST, LARGEST = 96, 640  # pixels of the longer side that pictures are drawn at
LEGIBLE = 13  # pixels of an em, at least
USUAL = {SIDE: 0.25, 256: 0.3}  # sides that pictures are often drawn at, and their shares
PLAIN_OF_EIGHT = 1  # so many of eight pictures are plain ones
WAITING = 400  # pictures that wait to be seen again
ORDERS = [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]  # of red, green and blue
Sample = dict[str, Any]  # pixels, labels, the row of a talk, and what is shown
Batch = dict[str, Any]


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8[512, 512, 3] of a picture, padded and resized as the runtime does."""
    square = padded(image)
    if square.width != SIDE:
        square = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.array(square, np.uint8)


def drawn_at(seed: int | str, em: float = 1.0) -> int:
    """The longer side of the picture of a seed, in pixels; print of `em` stays legible."""
    rng = Random(f"{seed}-size")
    usual, often = list(USUAL), [*USUAL.values(), 1 - sum(USUAL.values())]
    side = rng.choices([*usual, rng.randint(SMALLEST, LARGEST)], often)[0]
    return max(side, min(LARGEST, round(LEGIBLE / em)))


def labelled(flat: plain.Scene) -> Scene:
    """A plain scene as one of the wider drawings, for its labels."""
    marks = tuple(
        Mark(mark.label, mark.box, number if flat.text else 0)
        for number, mark in enumerate(flat.marks, 1)
    )
    return Scene(
        flat.kind, flat.colour, flat.background, flat.colour_rgb, flat.background_rgb, marks,
        shape=flat.shape, place=flat.place, text=flat.text,
    )  # fmt: skip


def drawn(seed: str, number: int, pages: bool = True) -> tuple[Scene, np.ndarray]:
    """Picture `number` of the training and its scene; without `pages`, one that is asked about."""
    if number % 8 < PLAIN_OF_EIGHT:
        flat = plain.reading_scene(seed) if number % 3 else plain.scene(seed)
        return labelled(flat), pixels_of(plain.draw(flat, drawn_at(seed, flat.em or 1.0)))
    one = scene(seed) if pages and number % 2 else asked_scene(seed)
    em = min((line.em for line in one.lines), default=1.0)
    return one, pixels_of(draw(one, drawn_at(seed, em)))


def recoloured(one: Scene, order: list[int]) -> Scene:
    """The scene with its colour channels in another order, and what its colours are called then."""

    def turned(rgb: colours.RGB) -> colours.RGB:
        return rgb[order[0]], rgb[order[1]], rgb[order[2]]

    colour, ground = turned(one.colour_rgb), turned(one.background_rgb)
    named = one.look.backdrop == "plain"
    return replace(
        one, colour_rgb=colour, colour=colours.name(colour) if one.marks else "",
        background_rgb=ground, background=colours.name(ground) if named else "",
    )  # fmt: skip


class Pictures(IterableDataset[Sample]):
    """Scenes `name-start`, `name-(start+1)`, ...; each is seen once more in other colours."""

    def __init__(
        self, name: str, start: int, prompter: Prompter, again: bool = True, pages: bool = True
    ) -> None:
        self.name, self.start, self.prompter = name, start, prompter
        self.again, self.pages = again, pages

    def sample(self, one: Scene, pixels: np.ndarray, rng: Random) -> Sample:
        row = talk_row(one, rng, self.prompter)
        return {"pixels": pixels, **labels(one), "row": row, "shown": one}

    def __iter__(self) -> Iterator[Sample]:
        rng, waiting = Random(f"{self.name}-{self.start}"), []
        index = self.start
        while True:
            one, pixels = drawn(f"{self.name}-{index}", index, self.pages)
            yield self.sample(one, pixels, rng)
            index += 1
            if not self.again:
                continue
            waiting.append((one, pixels))
            if len(waiting) > WAITING:
                place = rng.randrange(len(waiting))
                waiting[place], waiting[-1] = waiting[-1], waiting[place]
                one, pixels = waiting.pop()
                order = rng.choice(ORDERS)
                other = np.ascontiguousarray(pixels[..., order])
                yield self.sample(recoloured(one, order), other, rng)


class Pairs(IterableDataset[Sample]):
    """Two pictures each, and what has changed from the first to the second."""

    def __init__(self, name: str, start: int, prompter: Prompter, changed: bool = False) -> None:
        self.name, self.start, self.prompter, self.changed = name, start, prompter, changed

    def __iter__(self) -> Iterator[Sample]:
        index = self.start
        while True:
            seed = f"{self.name}-pair-{index}"
            one, other, told = pair(seed, self.changed)
            em = min((line.em for line in (*one.lines, *other.lines)), default=1.0)
            side, rng = drawn_at(seed, em), Random(f"{seed}-asked")
            pixels = np.stack([pixels_of(draw(scene, side)) for scene in (one, other)])
            row = said_of_pair(told, rng, self.prompter)
            yield {"pixels": pixels, "row": row, "shown": told}
            index += 1


def collate(samples: list[Sample]) -> Batch:
    ids, targets = padded_rows([sample["row"] for sample in samples])
    names = [name for name in samples[0] if name not in ("row", "shown")]
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in names}
    return batch | {"ids": ids, "targets": targets, "shown": [s["shown"] for s in samples]}


def yielding(worker: int) -> None:
    """A drawing process lets the training go first."""
    os.nice(5)


def batches(data: IterableDataset[Sample], size: int, ahead: int = 12) -> Iterator[Batch]:
    """Batches drawn by one background process."""
    return iter(DataLoader(
        data, size, num_workers=1, prefetch_factor=ahead, collate_fn=collate,
        worker_init_fn=yielding,
    ))  # fmt: skip
