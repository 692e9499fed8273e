"""Stage 1: the vision tower alone, on labels that the drawing knows.

Heads that are linear on the tower's output tokens (their mean; the text's on all four, so that a
character may lie in the token nearest to it), and dense heads on the stride-16 map: which mark
covers each 8-pixel cell, and which character of the text it is. The heads are thrown away
afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

import numpy as np
import plain
import torch
import torch.nn.functional as F
from colours import COLOURS
from draw import MAX_COUNT, PLACES, SHAPES, Mark, Scene, scene
from network import Shape, VisionTower
from PIL import Image
from render import draw, padded
from texts import ALPHABET, MAX_SLOTS, MAX_TEXT
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

SIDE = 128
CELLS = 16
TOKENS = 4
SMALLEST, LARGEST = 72, 360  # pixels of the longer side that pictures are drawn at
LABELS = {label: i + 1 for i, label in enumerate((*ALPHABET, *SHAPES))}
HEADS = {
    "background": len(COLOURS), "colour": len(COLOURS), "shape": len(SHAPES) + 2,
    "count": MAX_COUNT + 1, "place": len(PLACES),
}  # fmt: skip
TEXT, UNKNOWN = len(SHAPES), len(SHAPES) + 1  # of the shape head
CHARACTERS = " " + ALPHABET  # of a slot of the text head, after 0: none
SHORT_TEXT = 6  # characters at most, for this many pictures; then one more for each so many
SHORT_PICTURES = 300_000
LENGTHEN_EVERY = 50_000
PLAIN_EVERY = 4  # every fourth picture is a plain one
NEVER = -100  # a class that is not asked
POOL = 48  # batches from which pictures are seen once more
ORDERS = [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]  # of red, green and blue
Sample = dict[str, np.ndarray]


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8[128, 128, 3] of a picture, padded and resized as the runtime does."""
    square = padded(image)
    return np.array(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.uint8)


def drawn_at(seed: int | str) -> int:
    """The longer side of the picture of a seed, in pixels."""
    return Random(f"{seed}-size").randint(SMALLEST, LARGEST)


def cells(scene: Scene) -> np.ndarray:
    """int64[2, 16, 16]: label of the mark over each cell (0: none), and its number in the text."""
    grid = np.zeros((2, CELLS, CELLS), np.int64)
    x_pad, y_pad = (1 - scene.width) / 2, (1 - scene.height) / 2
    for mark in scene.marks:
        left, top, right, bottom = mark.box
        left, right = (left + x_pad) * CELLS - 0.5, (right + x_pad) * CELLS - 0.5
        top, bottom = (top + y_pad) * CELLS - 0.5, (bottom + y_pad) * CELLS - 0.5
        x0, x1 = np.ceil(left), np.floor(right)
        if x1 < x0:
            x0 = x1 = np.round((left + right) / 2)
        y0, y1 = np.ceil(top), np.floor(bottom)
        if y1 < y0:
            y0 = y1 = np.round((top + bottom) / 2)
        x0, x1, y0, y1 = (int(min(CELLS - 1, max(0, v))) for v in (x0, x1, y0, y1))
        grid[0, y0 : y1 + 1, x0 : x1 + 1] = LABELS[mark.label]
        grid[1, y0 : y1 + 1, x0 : x1 + 1] = mark.number
    return grid


def facts(scene: Scene) -> np.ndarray:
    """int64[5 + 14]: the classes of HEADS, then the characters (0: none); -100: not asked."""
    colours = list(COLOURS)
    shape = {"unknown": UNKNOWN, "text": TEXT, "page": NEVER}.get(scene.kind, NEVER)
    text = [CHARACTERS.index(c) + 1 for c in scene.text]
    return np.array([
        colours.index(scene.background) if scene.background else NEVER,
        colours.index(scene.colour) if scene.colour else NEVER,
        SHAPES.index(scene.shape) if scene.shape else shape,
        scene.count if scene.kind != "page" else NEVER,
        PLACES.index(scene.place) if scene.place else NEVER,
        *text, *[0] * (MAX_SLOTS - len(text)),
    ], np.int64)  # fmt: skip


def longest(index: int) -> int:
    """How many characters picture number `index` of the training may have.

    The first characters of a text are learned first; longer texts come by and by.
    """
    return min(MAX_TEXT, SHORT_TEXT + max(0, index - SHORT_PICTURES) // LENGTHEN_EVERY)


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


class Pictures(IterableDataset[Sample]):
    """Scenes `name-start`, `name-(start+1)`, ... without end."""

    def __init__(self, name: str, start: int) -> None:
        self.name, self.start = name, start

    def __iter__(self) -> Iterator[Sample]:
        index = self.start
        while True:
            seed = f"{self.name}-{index}"
            if self.name == "train" and index % PLAIN_EVERY == 0:
                flat = plain.reading_scene(seed)
                one, image = labelled(flat), plain.draw(flat, drawn_at(seed))
            else:
                one = scene(seed, most=longest(index) if self.name == "train" else MAX_TEXT)
                image = draw(one, drawn_at(seed))
            pixels = pixels_of(image)
            yield {"pixels": pixels, "cells": cells(one), "facts": facts(one)}
            index += 1


def yielding(worker: int) -> None:
    """A drawing process lets the training go first."""
    os.nice(5)


def batches(name: str, start: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches drawn by one background process."""
    loader = DataLoader(
        Pictures(name, start), size, num_workers=1, prefetch_factor=12, worker_init_fn=yielding
    )
    return iter(loader)


def recoloured(batch: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """The batch with its colour channels in another order; its colours are not asked then."""
    facts = batch["facts"].clone()
    facts[:, :2] = NEVER  # background and colour
    return batch | {"pixels": batch["pixels"][..., order].contiguous(), "facts": facts}


def twice(source: Iterator[dict[str, Tensor]], seed: int) -> Iterator[dict[str, Tensor]]:
    """Every batch of `source`, and after each one another: pictures of the last POOL batches in
    other colours. Drawing costs a third of the training's time otherwise."""
    rng, pool = Random(seed), []
    for batch in source:
        yield batch
        pool = [*pool, batch][-POOL:]
        size = len(batch["pixels"])
        places = [(rng.randrange(len(pool)), rng.randrange(size)) for _ in range(size)]
        mixed = {key: torch.stack([pool[i][key][j] for i, j in places]) for key in batch}
        yield recoloured(mixed, rng.choice(ORDERS))


def to_float(pixels: Tensor) -> Tensor:
    """uint8[B, H, W, 3] -> float[B, 3, H, W] in [0, 1], channels last in memory."""
    return (pixels.float() / 255).permute(0, 3, 1, 2)


class Heads(nn.Module):
    """The labels' linear heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attributes = nn.Linear(shape.vision_dim, sum(HEADS.values()))
        self.text = nn.Linear(TOKENS * shape.vision_dim, MAX_SLOTS * (len(CHARACTERS) + 1))
        self.cells = nn.Linear(shape.dims[2], 4 * (len(LABELS) + 1 + MAX_SLOTS + 1))

    def forward(self, features: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = features.mean((2, 3))
        text = self.text(features.flatten(1) / TOKENS**0.5).view(len(mean), MAX_SLOTS, -1)
        dense = self.cells(middle.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.attributes(mean), text, F.pixel_shuffle(dense, 2)


def balanced(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in which covered and empty cells weigh the same."""
    loss = F.cross_entropy(logits, target, reduction="none")
    covered = target > 0
    empty = loss[~covered].mean()
    return empty + loss[covered].mean() if covered.any() else empty


def losses(
    heads: Heads, features: Tensor, middle: Tensor, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The loss of each kind of label."""
    attributes, text, dense = heads(features, middle)
    split = attributes.split(list(HEADS.values()), 1)
    asked = (batch["facts"][:, : len(HEADS)] >= 0).any(0).tolist()
    parts = {
        name: F.cross_entropy(logits, batch["facts"][:, i], label_smoothing=0.02)
        for i, (name, logits) in enumerate(zip(HEADS, split, strict=True))
        if asked[i]
    }
    printed = batch["facts"][:, 2] == TEXT
    slots = batch["facts"][printed, 5:]
    each = F.cross_entropy(
        text[printed].flatten(0, 1), slots.flatten(), reduction="none", label_smoothing=0.02
    ).view(slots.shape)
    asked = torch.cat([torch.ones_like(slots[:, :1]), (slots > 0).long()[:, :-1]], 1)  # and the end
    weight = torch.where(asked > 0, 1.0, 0.1)
    parts["text"] = 6 * (each * weight).sum() / weight.sum()
    parts["cells"] = balanced(dense[:, : len(LABELS) + 1], batch["cells"][:, 0])
    parts["order"] = balanced(dense[printed, len(LABELS) + 1 :], batch["cells"][printed, 1])
    return parts


@torch.no_grad()
def accuracy(
    tower: VisionTower, heads: Heads, pictures: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Share of right answers of each head (text: whole texts; chars: single characters)."""
    tower.eval()
    right: dict[str, list[Tensor]] = {}
    for batch in pictures:
        attributes, text, dense = heads(*tower(to_float(batch["pixels"])))
        split = attributes.split(list(HEADS.values()), 1)
        for i, (name, logits) in enumerate(zip(HEADS, split, strict=True)):
            target = batch["facts"][:, i]
            right.setdefault(name, []).append((logits.argmax(1) == target)[target >= 0])
        printed = batch["facts"][:, 2] == TEXT
        slots = batch["facts"][printed, 5:]
        hit = text[printed].argmax(2) == slots
        short = (slots > 0).sum(1) <= 6
        right.setdefault("short", []).append(hit[short].all(1))
        right.setdefault("long", []).append(hit[~short].all(1))
        right.setdefault("chars", []).append(hit[slots > 0])
        covered = batch["cells"] > 0
        split_dense = dense.split([len(LABELS) + 1, MAX_SLOTS + 1], 1)
        for i, (name, logits) in enumerate(zip(("cells", "order"), split_dense, strict=True)):
            same = logits.argmax(1) == batch["cells"][:, i]
            right.setdefault(name, []).append(same[covered[:, i]])
    tower.train()
    return {name: torch.cat(hits).float().mean().item() for name, hits in right.items()}
