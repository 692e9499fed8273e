"""Which of a picture's tokens stay: the most different ones, or any.

by_distance is DivPrune's rule (arXiv 2503.02175), by_volume the greedy search for the likeliest
set of a determinantal point process, which CDPruner (arXiv 2506.10967) uses where a text weighs the
tokens; none does here. Both are written from the papers' equations. The device makes the
similarities of all pairs; the search is a loop over small rows, which is the host's.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..picture.token_budget import Reduction
from .blocks import blocks, groups, picture_places, staying_places

Pick = Callable[[np.ndarray, int], np.ndarray]  # float32[n, n] similarities, k -> int[k]
SEED = 0  # of "random": the same picture gives the same tokens
LEAST = 1e-6  # volume below which a token adds nothing but rounding


def chosen(tokens: mx.array, reduction: Reduction, pick: Pick) -> np.ndarray:
    """int32[K]: of [N, D] those of each block that `pick` chooses by their cosine similarities."""
    alike = groups(reduction)
    stacks = [
        tokens[mx.array(np.add.outer(starts, picture_places(part.block)))]
        for part, starts in alike.items()
    ]
    similar = on_host([cosines(stack) for stack in stacks])
    places: dict[int, np.ndarray] = {}
    for (part, starts), matrices in zip(alike.items(), similar, strict=True):
        places |= {
            start: picture_places(part.block)[pick(matrix, part.tokens)]
            for start, matrix in zip(starts, matrices, strict=True)
        }
    return remaining(reduction, places)


def random(tokens: mx.array, reduction: Reduction) -> np.ndarray:
    """int32[K]: as many of [N, D] as the others leave, drawn without looking."""
    draw = np.random.default_rng(SEED)
    places = {
        start: draw.permutation(picture_places(part.block))[: part.tokens]
        for start, part in blocks(reduction)
    }
    return remaining(reduction, places)


def remaining(reduction: Reduction, places: dict[int, np.ndarray]) -> np.ndarray:
    """int32[K]: all that stays of a picture's tokens, in order; places: of each block's own, by
    where it begins."""
    parts = [
        start + np.sort(np.concatenate([places[start], staying_places(part)]))
        for start, part in blocks(reduction)
    ]
    return np.concatenate(parts).astype(np.int32)


def cosines(tokens: mx.array) -> mx.array:
    """[T, n, D] -> float32 [T, n, n], the cosine similarity of every pair."""
    x = tokens.astype(mx.float32)
    x = x * mx.rsqrt(mx.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24))
    return x @ x.swapaxes(-1, -2)


def on_host(arrays: list[mx.array]) -> list[np.ndarray]:
    """Arrays' values: the one wait for the device that choosing costs a picture."""
    mx.eval(arrays)
    return [np.asarray(array) for array in arrays]


def by_distance(similar: np.ndarray, count: int) -> np.ndarray:
    """int[count]: first the token whose nearest other is farthest, then always the one that is
    farthest from its nearest among the chosen. float32[n, n] cosine similarities."""
    distance = 1 - similar
    np.fill_diagonal(distance, np.inf)
    nearest = distance.min(axis=1)
    picked = np.empty(count, np.intp)
    nearest_chosen = np.full(len(similar), np.inf, similar.dtype)
    for index in range(count):
        best = (nearest_chosen if index else nearest).argmax()
        picked[index] = best
        np.minimum(nearest_chosen, distance[best], out=nearest_chosen)
        nearest_chosen[best] = -np.inf
    return picked


def by_volume(similar: np.ndarray, count: int) -> np.ndarray:
    """int[count]: always the token that spans the most with the chosen, by an incremental Cholesky
    factorisation (arXiv 1709.05135). Alone they all span the same, and the first one is taken.
    float32[n, n] cosine similarities."""
    left = np.ones(len(similar))
    rows = np.zeros((count, len(similar)), np.float64)
    picked = np.empty(count, np.intp)
    for index in range(count):
        best = left.argmax()
        picked[index] = best
        row = similar[best] - rows[:index, best] @ rows[:index]
        rows[index] = row / np.sqrt(max(left[best], LEAST))
        left -= rows[index] ** 2
        left[best] = -np.inf
    return picked
