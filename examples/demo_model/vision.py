"""Stage 1: the vision tower alone, on labels that the drawing knows.

Heads that are linear on the mean of the tower's output tokens (so that a decoder which averages
them can read the same facts), and dense heads on the stride-16 map: which mark covers each
8-pixel cell, and which character of the text it is. The heads are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from draw import ALPHABET, COLOURS, MAX_COUNT, MAX_TEXT, PLACES, SHAPES, Scene, draw, scene
from network import Shape, VisionTower
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

SIDE = 128
CELLS = 16
DRAWN_AT = (192, 256, 320)
LABELS = {label: i + 1 for i, label in enumerate((*ALPHABET, *SHAPES))}
HEADS = {
    "background": len(COLOURS), "colour": len(COLOURS), "shape": len(SHAPES) + 1,
    "count": MAX_COUNT + 1, "place": len(PLACES),
}  # fmt: skip
Sample = dict[str, np.ndarray]


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8[128, 128, 3] of a square picture, resized as the runtime does."""
    return np.array(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.uint8)


def cells(scene: Scene) -> np.ndarray:
    """int64[2, 16, 16]: label of the mark over each cell (0: none), and its number in the text."""
    grid = np.zeros((2, CELLS, CELLS), np.int64)
    for number, mark in enumerate(scene.marks):
        left, top, right, bottom = (v * CELLS - 0.5 for v in mark.box)
        x0, x1 = np.ceil(left), np.floor(right)
        if x1 < x0:
            x0 = x1 = np.round((left + right) / 2)
        y0, y1 = np.ceil(top), np.floor(bottom)
        x0, x1, y0, y1 = (int(min(CELLS - 1, max(0, v))) for v in (x0, x1, y0, y1))
        grid[0, y0 : y1 + 1, x0 : x1 + 1] = LABELS[mark.label]
        grid[1, y0 : y1 + 1, x0 : x1 + 1] = number + 1 if scene.text else 0
    return grid


def facts(scene: Scene) -> np.ndarray:
    """int64[5 + 6]: the classes of HEADS, then the characters (0: none); -100: not asked."""
    colours = list(COLOURS)
    text = [ALPHABET.index(c) + 1 for c in scene.text]
    return np.array([
        colours.index(scene.background),
        colours.index(scene.colour),
        SHAPES.index(scene.shape) if scene.shape else len(SHAPES),
        scene.count,
        PLACES.index(scene.place) if scene.place else -100,
        *text, *[0] * (MAX_TEXT - len(text)),
    ], np.int64)  # fmt: skip


class Pictures(IterableDataset[Sample]):
    """Scenes `name-start`, `name-(start+1)`, ... without end."""

    def __init__(self, name: str, start: int) -> None:
        self.name, self.start = name, start

    def __iter__(self) -> Iterator[Sample]:
        index = self.start
        while True:
            seed = f"{self.name}-{index}"
            one = scene(seed)
            image = draw(one, DRAWN_AT[index % len(DRAWN_AT)])
            yield {"pixels": pixels_of(image), "cells": cells(one), "facts": facts(one)}
            index += 1


def batches(name: str, start: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches drawn by one background process."""
    loader = DataLoader(Pictures(name, start), size, num_workers=1, prefetch_factor=8)
    return iter(loader)


def to_float(pixels: Tensor) -> Tensor:
    """uint8[B, H, W, 3] -> float[B, 3, H, W] in [0, 1], channels last in memory."""
    return (pixels.float() / 255).permute(0, 3, 1, 2)


class Heads(nn.Module):
    """The labels' linear heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attributes = nn.Linear(shape.vision_dim, sum(HEADS.values()))
        self.text = nn.Linear(shape.vision_dim, MAX_TEXT * (len(ALPHABET) + 1))
        self.cells = nn.Linear(shape.dims[2], 4 * (len(LABELS) + 1 + MAX_TEXT + 1))

    def forward(self, features: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = features.mean((2, 3))
        text = self.text(mean).view(len(mean), MAX_TEXT, -1)
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
    parts = {
        name: F.cross_entropy(logits, batch["facts"][:, i], label_smoothing=0.02)
        for i, (name, logits) in enumerate(zip(HEADS, split, strict=True))
    }
    printed = batch["facts"][:, 2] == len(SHAPES)
    parts["text"] = MAX_TEXT * F.cross_entropy(
        text[printed].flatten(0, 1), batch["facts"][printed, 5:].flatten(), label_smoothing=0.02
    )
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
        hit = text.argmax(2) == batch["facts"][:, 5:]
        printed = batch["facts"][:, 2] == len(SHAPES)
        right.setdefault("text", []).append(hit[printed].all(1))
        right.setdefault("chars", []).append(hit[printed & (batch["facts"][:, 5] > 0)].flatten())
        covered = batch["cells"] > 0
        split_dense = dense.split([len(LABELS) + 1, MAX_TEXT + 1], 1)
        for i, (name, logits) in enumerate(zip(("cells", "order"), split_dense, strict=True)):
            same = logits.argmax(1) == batch["cells"][:, i]
            right.setdefault(name, []).append(same[covered[:, i]])
    tower.train()
    return {name: torch.cat(hits).float().mean().item() for name, hits in right.items()}
