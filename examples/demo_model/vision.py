"""What the vision tower is taught directly: labels that the drawing knows, and their heads.

Attributes are read linearly from the mean of the visual tokens; from each token, and from each
cell of the stride-32 map, the characters whose centres lie in its square; from the token the
number of the first of them in the text too; and on the stride-16 map, from every 8-pixel cell,
which mark covers it and which character of the text it is. The heads are thrown away afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from colours import COLOURS
from draw import MAX_COUNT, PLACES, SHAPES, Mark, Scene
from network import Shape, VisionTower
from texts import ALPHABET, MAX_SLOTS
from torch import Tensor, nn

SIDE = Shape().image_size
CELLS = SIDE // 8
GRID = SIDE // 64  # visual tokens in a row
HELD = {GRID: 8, 2 * GRID: 4}  # characters of a token, and of a stride-32 cell, that are asked
LABELS = {label: i + 1 for i, label in enumerate((*ALPHABET, *SHAPES))}
HEADS = {
    "background": len(COLOURS), "colour": len(COLOURS), "shape": len(SHAPES) + 2,
    "count": MAX_COUNT + 1, "place": len(PLACES),
}  # fmt: skip
TEXT, UNKNOWN = len(SHAPES), len(SHAPES) + 1  # of the shape head
CHARACTERS = " " + ALPHABET  # of a token's slot, after 0: none
NEVER = -100  # a class that is not asked
WEIGHTS = {"text": 1.5, "parts": 1.0, "cells": 1.0}  # of the losses; the others have 0.5
Labels = dict[str, np.ndarray]


def bounds(mark: Mark, scene: Scene) -> tuple[float, float, float, float]:
    """The mark's box in the padded square, fractions of its side."""
    x, y = (1 - scene.width) / 2, (1 - scene.height) / 2
    left, top, right, bottom = mark.box
    return left + x, top + y, right + x, bottom + y


def cells(scene: Scene) -> np.ndarray:
    """int64[2, 64, 64]: label of the mark over each cell (0: none), and its number in the text."""
    grid = np.zeros((2, CELLS, CELLS), np.int64)
    for mark in scene.marks:
        left, top, right, bottom = (CELLS * side - 0.5 for side in bounds(mark, scene))
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


def held(scene: Scene, grid: int = GRID) -> np.ndarray:
    """int64[64, 1 + 8]: of each visual token the number in the text of its first character (0:
    it has none), then its characters, a space before the one that follows it (0: none).

    With the stride-32 map's grid int64[256, 1 + 4]. What holds more is not asked."""
    table = np.zeros((grid * grid, 1 + HELD[grid]), np.int64)
    filled, before = [0] * len(table), 0
    for mark in scene.marks:
        left, top, right, bottom = bounds(mark, scene)
        column, row = (int(grid * c / 2) for c in (left + right, top + bottom))
        token = grid * min(grid - 1, max(0, row)) + min(grid - 1, max(0, column))
        characters = [" "] * (mark.number > before + 1) + [mark.label]
        before = mark.number
        if not filled[token]:
            table[token, 0] = mark.number
        for character in characters:
            filled[token] += 1
            if filled[token] <= HELD[grid]:
                table[token, filled[token]] = CHARACTERS.index(character) + 1
    table[np.array(filled) > HELD[grid], 1:] = NEVER
    return table


def facts(scene: Scene) -> np.ndarray:
    """int64[5]: the classes of HEADS; -100: not asked."""
    colours = list(COLOURS)
    shape = {"unknown": UNKNOWN, "text": TEXT}.get(scene.kind, NEVER)
    return np.array([
        colours.index(scene.background) if scene.background else NEVER,
        colours.index(scene.colour) if scene.colour else NEVER,
        SHAPES.index(scene.shape) if scene.shape else shape,
        scene.count if scene.kind != "page" else NEVER,
        PLACES.index(scene.place) if scene.place else NEVER,
    ], np.int64)  # fmt: skip


def labels(scene: Scene) -> Labels:
    """All that the heads are asked about a scene."""
    read = replace(scene, marks=()) if scene.shape else scene
    return {
        "cells": cells(scene),
        "facts": facts(scene),
        "held": held(read),
        "parts": held(read, 2 * GRID),
    }


def to_float(pixels: Tensor) -> Tensor:
    """uint8[B, H, W, 3] -> float[B, 3, H, W] in [0, 1], channels last in memory."""
    return (pixels.float() / 255).permute(0, 3, 1, 2)


class Heads(nn.Module):
    """The labels' linear heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attributes = nn.Linear(shape.vision_dim, sum(HEADS.values()))
        self.first = nn.Linear(shape.vision_dim, MAX_SLOTS + 1)
        self.text = nn.Linear(shape.vision_dim, HELD[GRID] * (len(CHARACTERS) + 1))
        self.parts = nn.Linear(shape.dims[3], HELD[2 * GRID] * (len(CHARACTERS) + 1))
        self.cells = nn.Linear(shape.dims[2], 4 * (len(LABELS) + 1 + MAX_SLOTS + 1))

    def of_tokens(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits: attributes[B, .], first[B, 64, 15], text[B, 64, 8, 64]."""
        tokens = features.permute(0, 2, 3, 1).flatten(1, 2)
        text = self.text(tokens).unflatten(2, (HELD[GRID], -1))
        return self.attributes(tokens.mean(1)), self.first(tokens), text

    def of_middle(self, middle: Tensor) -> Tensor:
        """Logits[B, 256, 4, 64] of the stride-32 map."""
        squares = middle.permute(0, 2, 3, 1).flatten(1, 2)
        return self.parts(squares).unflatten(2, (HELD[2 * GRID], -1))

    def of_cells(self, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the 8-pixel cells: marks[B, ., 64, 64], order[B, 15, 64, 64]."""
        dense = self.cells(fine.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        marks, order = F.pixel_shuffle(dense, 2).split([len(LABELS) + 1, MAX_SLOTS + 1], 1)
        return marks, order


def balanced(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in which covered and empty cells weigh the same."""
    loss = F.cross_entropy(logits, target, reduction="none")
    covered = target > 0
    empty = loss[~covered].mean()
    return empty + loss[covered].mean() if covered.any() else empty


def spelled(logits: Tensor, table: Tensor) -> Tensor:
    """The loss of the characters that squares hold: logits[B, squares, slots, classes] and the
    table of `held`; what comes after the end of a square's characters hardly counts."""
    slots, some = table[..., 1:], table[..., 1:2] > 0
    each = F.cross_entropy(logits.flatten(0, 2), slots.flatten(), reduction="none")
    asked = torch.cat([some, (slots[..., :-1] > 0) & some], -1)  # a character, or their end
    weight = torch.where(asked, 1.0, torch.where(some, 0.1, 0.02))
    return 3 * (each.view(slots.shape) * weight).sum() / weight.sum()


def printed(batch: dict[str, Tensor]) -> Tensor:
    """bool[B]: the pictures of a text."""
    return batch["facts"][:, 2] == TEXT


def lettered(batch: dict[str, Tensor]) -> Tensor:
    """bool[B]: the pictures of characters, of a text or of a page of print."""
    return (batch["held"][..., 1] > 0).any(1)


def fine_losses(heads: Heads, fine: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of the stride-16 map's labels."""
    marks, order = heads.of_cells(fine)
    some = printed(batch)
    parts = {"cells": balanced(marks, batch["cells"][:, 0])}
    return parts | ({"order": balanced(order[some], batch["cells"][some, 1])} if some.any() else {})


def losses(
    heads: Heads, features: Tensor, middle: Tensor, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The losses of the labels of conv_exp's and of the stride-32 map."""
    attributes, first, text = heads.of_tokens(features)
    split = attributes.split(list(HEADS.values()), 1)
    asked = (batch["facts"] >= 0).any(0).tolist()
    parts = {
        name: F.cross_entropy(logits, batch["facts"][:, i], label_smoothing=0.02)
        for i, (name, logits) in enumerate(zip(HEADS, split, strict=True))
        if asked[i]
    }
    some = printed(batch)
    if some.any():
        numbers = batch["held"][some][..., 0]
        parts["first"] = balanced(first[some].flatten(0, 1), numbers.flatten())
    some = lettered(batch)
    if some.any():
        parts["text"] = spelled(text[some], batch["held"][some])
        parts["parts"] = spelled(heads.of_middle(middle[some]), batch["parts"][some])
    return parts


def weighted(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([WEIGHTS.get(name, 0.5) * value for name, value in parts.items()]).sum()


def read(first: Tensor, text: Tensor) -> list[str]:
    """What the heads read in each picture: first[B, 64] and text[B, 64, 8], classes."""
    result = []
    for numbers, tokens in zip(first.tolist(), text.tolist(), strict=True):
        order = sorted((number, i) for i, number in enumerate(numbers) if number)
        said = "".join(CHARACTERS[c - 1] for _, i in order for c in tokens[i] if c > 0)
        result.append(said.strip())
    return result


@torch.no_grad()
def accuracy(
    tower: VisionTower, heads: Heads, pictures: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Share of right answers of each head (short, long: whole texts; chars: of the tokens)."""
    tower.eval()
    right: dict[str, list[Tensor]] = {}
    for batch in pictures:
        fine = tower.lower(to_float(batch["pixels"]))
        features, middle = tower.upper(fine)
        attributes, first, text = heads.of_tokens(features)
        split = attributes.split(list(HEADS.values()), 1)
        for i, (name, logits) in enumerate(zip(HEADS, split, strict=True)):
            target = batch["facts"][:, i]
            right.setdefault(name, []).append((logits.argmax(1) == target)[target >= 0])
        some = printed(batch)
        table = batch["held"][some]
        numbers, said = first[some].argmax(2), text[some].argmax(3)
        want = read(table[..., 0], table[..., 1:])
        hits = [a == b for a, b in zip(read(numbers, said), want, strict=True)]
        for name, short in (("short", True), ("long", False)):
            chosen = [h for h, w in zip(hits, want, strict=True) if (len(w) <= 6) == short]
            right.setdefault(name, []).append(torch.tensor(chosen))
        right.setdefault("first", []).append((numbers == table[..., 0])[table[..., 0] > 0])
        right.setdefault("chars", []).append((said == table[..., 1:])[table[..., 1:] > 0])
        squares = heads.of_middle(middle[some]).argmax(3)
        held_there = batch["parts"][some][..., 1:]
        right.setdefault("parts", []).append((squares == held_there)[held_there > 0])
        covered = batch["cells"] > 0
        of_cells = dict(zip(("cells", "order"), heads.of_cells(fine), strict=True))
        for i, (name, logits) in enumerate(of_cells.items()):
            same = logits.argmax(1) == batch["cells"][:, i]
            right.setdefault(name, []).append(same[covered[:, i]])
    tower.train()
    return {name: torch.cat(hits).float().mean().item() for name, hits in right.items()}
