"""Neighbouring tokens of a picture -> their mean.

A block's cut has lines, of whole rows each, and a line as many windows of whole tokens as are left
for it: a quarter of the tokens is 2 x 2 average pooling, and any number goes.
"""

from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..picture.token_budget import Cut, Reduction, bounds
from .blocks import blocks, groups, picture_places, staying_places


def pooled(tokens: mx.array, reduction: Reduction) -> mx.array:
    """Tokens [N, D] -> the means of each block's windows, separators between the lines."""
    parts: dict[int, mx.array] = {}
    for part, starts in groups(reduction).items():
        places = np.add.outer(starts, picture_places(part.block))
        weights = mx.array(windows(part)).astype(tokens.dtype)
        means = weights @ tokens[mx.array(places)]  # [T, tokens, D]
        staying = tokens[mx.array(np.add.outer(starts, staying_places(part)))]
        both = mx.concatenate([means, staying], axis=1)[:, mx.array(order(part))]
        parts |= dict(zip(starts, both, strict=True))
    return mx.concatenate([parts[start] for start, _ in blocks(reduction)])


def lengths(part: Cut) -> np.ndarray:
    """int[lines]: windows in each line."""
    return np.diff(bounds(part.tokens, part.lines))


def windows(part: Cut) -> np.ndarray:
    """float32[tokens, rows * columns]: rows of weights that sum to one, line by line."""
    rows, columns = part.block.rows, part.block.columns
    weights = np.zeros((part.tokens, rows, columns), np.float32)
    heights, index = bounds(rows, part.lines), 0
    for line, count in enumerate(lengths(part)):
        edges = bounds(columns, count) if count else []
        for left, right in pairwise(edges):
            window = weights[index, heights[line] : heights[line + 1], left:right]
            window[:] = 1 / window.size
            index += 1
    return weights.reshape(part.tokens, rows * columns)


def order(part: Cut) -> np.ndarray:
    """int32[K]: the order of a block's windows and of what stays behind them, as it was.

    Block(4, 4, ended=True, before=1) in 2 lines of 2 windows -> [4, 0, 1, 5, 2, 3, 6]
    """
    block, tokens = part.block, part.tokens
    staying = iter(range(tokens, part.total))
    sequence = [next(staying) for _ in range(block.before)]
    edges = bounds(tokens, part.lines)
    for start, end in pairwise(edges):
        sequence += range(start, end)
        sequence += [next(staying)] if block.ended else []
    return np.array([*sequence, *staying], np.int32)
