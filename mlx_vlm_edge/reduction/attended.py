"""Which of a picture's tokens stay by the vision tower's attention; nothing waits for the device.

by_layers is HiPrune's choice (arXiv 2508.00553), zipped VisionZip's (arXiv 2412.04467), written
from their equations. HiPrune's neighbours end with a row here; its authors' go on in the next.
"""

import mlx.core as mx
import numpy as np

from ..picture.token_budget import Block, Cut, Reduction
from .blocks import groups, picture_places, staying_places

ANCHORS = 0.1  # share of HiPrune's tokens that are objects' centres and their neighbours
CROSS = 5  # tokens of an anchor and its neighbours
MERGED = 10 / 64  # share of VisionZip's tokens that gather what is left over: 10 of 64, 30 of 192


def by_layers(tokens: mx.array, reduction: Reduction, early: mx.array, late: mx.array) -> mx.array:
    """Tokens [N, D] -> those that receive most attention, float32[N] in an early and a late layer.

    A tenth are the early layer's anchors with their four neighbours, the others the late layer's.
    """
    places = []
    for part, starts in groups(reduction).items():
        body = mx.array(np.add.outer(starts, picture_places(part.block)).astype(np.uint32))
        chosen = mx.take_along_axis(body, best(early[body], late[body], part), axis=-1)
        staying = mx.array(np.add.outer(starts, staying_places(part)).astype(np.uint32))
        places += [chosen.reshape(-1), staying.reshape(-1)]
    return tokens[mx.sort(mx.concatenate(places))]


def best(early: mx.array, late: mx.array, part: Cut) -> mx.array:
    """int[T, tokens]: places among the own tokens of T blocks, float32[T, rows * columns] each."""
    count = round(ANCHORS * part.tokens / CROSS)
    if not count:
        return top(late, part.tokens)
    anchors = mx.put_along_axis(
        mx.zeros(early.shape, mx.bool_), top(early, count), mx.array(True), axis=-1
    )
    first = with_neighbours(anchors, part.block)
    # Attention is between 0 and 1, so that every one of those goes before every other.
    return top(mx.where(first, late + 2, late), part.tokens)


def with_neighbours(chosen: mx.array, block: Block) -> mx.array:
    """bool[T, rows * columns] -> the same and what is above, below, left and right of it."""
    grid = mx.pad(chosen.reshape(-1, block.rows, block.columns), [(0, 0), (1, 1), (1, 1)])
    near = grid[:, 1:-1, 1:-1] | grid[:, :-2, 1:-1] | grid[:, 2:, 1:-1]
    return (near | grid[:, 1:-1, :-2] | grid[:, 1:-1, 2:]).reshape(chosen.shape)


def top(values: mx.array, count: int) -> mx.array:
    """Places of the `count` largest along the last axis."""
    return mx.argsort(-values, axis=-1)[..., :count]


def zipped(hidden: mx.array, of_class: mx.array, keys: mx.array, total: int) -> mx.array:
    """Image features of one picture, class token first [1 + n, C] -> `total` of them, in order.

    The class token; those that it attends to most, float32[n]; and some of the rest, evenly placed,
    each with the mean of those others that are most like it by their keys, float32[n, d].
    """
    merged = min(round(MERGED * total), total - 1)
    dominant = total - 1 - merged
    features, order = hidden[1:], mx.argsort(-of_class)
    places = mx.sort(order[:dominant])
    if not merged:
        return mx.concatenate([hidden[:1], features[places]])
    rest = mx.sort(order[dominant:])  # int[n - dominant], whose number is known
    every = np.arange(rest.size)
    centres = every[:: rest.size // merged][:merged]
    others = np.setdiff1d(every, centres)
    middle = rest[mx.array(centres)]
    gathered = features[middle]
    if others.size:
        around = rest[mx.array(others)]
        k = keys * mx.rsqrt(mx.maximum((keys * keys).sum(axis=-1, keepdims=True), 1e-24))
        nearest = (k[around] @ k[middle].T).argmax(axis=-1)
        groups = (nearest[:, None] == mx.arange(merged)).astype(features.dtype)
        sizes = mx.maximum(groups.sum(axis=0), 1)[:, None]
        gathered = gathered + (groups.T @ features[around]) / sizes
    both = mx.concatenate([features[places], gathered])
    inorder = mx.argsort(mx.concatenate([places, middle]))
    return mx.concatenate([hidden[:1], both[inorder]])
