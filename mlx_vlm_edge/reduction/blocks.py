"""Where the tokens of a reduction's blocks are in [N, D], and where their separators are."""

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ..picture.token_budget import Block, Cut, Reduction, bounds


def blocks(reduction: Reduction) -> Iterator[tuple[int, Cut]]:
    """Where each block begins in a picture's tokens, and its cut."""
    start = 0
    for part in reduction.cuts:
        yield start, part
        start += part.block.total


def groups(reduction: Reduction) -> dict[Cut, list[int]]:
    """Blocks that are cut alike, which the device takes together, and where each begins."""
    alike: dict[Cut, list[int]] = {}
    for start, part in blocks(reduction):
        alike.setdefault(part, []).append(start)
    return alike


def picture_places(block: Block) -> np.ndarray:
    """int[rows * columns]: where the picture's tokens are in a block.

    Block(2, 2, ended=True, before=1) -> [1, 2, 4, 5]
    """
    rows, width = block.rows, block.columns + block.ended
    places = block.before + np.arange(rows * width).reshape(rows, width)
    return places[:, : block.columns].ravel()


def staying_places(part: Cut) -> np.ndarray:
    """int[n]: what stays of a block whichever of the picture's tokens do: those around the rows,
    and the separator that ends each line, which is that of the line's last row.

    Block(4, 2, ended=True, before=1) in 2 lines -> [0, 6, 12]
    """
    block = part.block
    width = block.columns + block.ended
    last = np.array(bounds(block.rows, part.lines)[1:]) * width - 1
    behind = block.total - block.after
    around = [np.arange(block.before), np.arange(behind, block.total)]
    ends = block.before + last[: part.lines * block.ended]
    return np.sort(np.concatenate([*around, ends]))


def block_scores(seen: mx.array, reduction: Reduction) -> mx.array:
    """What a square of patches has in each tile, float32[tiles, n * n] -> float32[N], of each token
    of as many blocks the mean of its patches, and 0 of what is not the picture's."""
    side, parts = math.isqrt(seen.shape[1]), []
    for tile, (_, part) in zip(seen, blocks(reduction), strict=True):
        block = part.block
        down, across = side // block.rows, side // block.columns
        grid = tile[: side * side].reshape(block.rows, down, block.columns, across)
        own = mx.zeros(block.total, mx.float32)
        own[mx.array(picture_places(block))] = grid.mean(axis=(1, 3)).reshape(-1)
        parts.append(own)
    return mx.concatenate(parts)
