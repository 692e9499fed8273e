"""Llama, some of whose layers let visual positions look at the picture again.

After such a layer its sampler takes the hidden states at those positions, [N, D], and what each of
them sees, [N, C], and gives what they are from there on. Other positions are left as they are, and
a token that is generated never looks: the caches hold what came of it.
Source: cambrian-mllm/cambrian, cambrian/model/language_model/cambrian_llama.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import llama
from .cache import Cache, Mask
from .decoder import Layer
from .llama import TextConfig


@dataclass(frozen=True, eq=False)
class Views:
    """positions: int[N], which of a pass look. seen: [N, C], a row of what each sees. looking: bool
    [N], which of them look after all, where only the device knows; None for all of them."""

    positions: np.ndarray
    seen: mx.array
    looking: mx.array | None = None

    def within(self, part: slice) -> "Views":
        """Those of a part of the positions, counted from its beginning."""
        here = np.flatnonzero((part.start <= self.positions) & (self.positions < part.stop))
        rows = mx.array(here)
        looking = None if self.looking is None else self.looking[rows]
        return Views(self.positions[here] - part.start, self.seen[rows], looking)


class Probe(nn.Module):
    """A sampler called as a layer is: every position looks, at numbers that are always the same."""

    def __init__(self, sampler: nn.Module, width: int) -> None:
        super().__init__()
        self.sampler = sampler
        self._width = width

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None) -> mx.array:
        shape = (x.shape[1], self._width)
        seen = mx.random.uniform(shape=shape, key=mx.random.key(0)).astype(x.dtype)
        return self.sampler(x[0], seen)[None]


class LanguageModel(llama.LanguageModel):
    """samplers: by the layer that each follows; they are called with [N, D] and [N, width]."""

    def __init__(self, config: TextConfig, samplers: Mapping[int, nn.Module], width: int) -> None:
        super().__init__(config)
        self.model.vision_sampler_layers = list(samplers.values())
        self._after, self._width = list(samplers), width

    def blocks(self, index: int) -> list[nn.Module]:
        layer = super().blocks(index)
        if index not in self._after:
            return layer
        sampler = self.model.vision_sampler_layers[self._after.index(index)]
        return [*layer, Probe(sampler, self._width)]

    def __call__(
        self,
        embeddings: mx.array,
        cache: Sequence[Cache] | None = None,
        last_only: bool = False,
        views: Views | None = None,
    ) -> mx.array:
        """Logits [B, L, V] of input embeddings [B, L, D], or [B, 1, V] with `last_only`.

        views: of the positions that look, of a batch of one.
        """
        if views is None or not len(views.positions):
            return super().__call__(embeddings, cache, last_only)
        layers: list[Layer] = list(self.model.layers)
        for index, sampler in zip(self._after, self.model.vision_sampler_layers, strict=True):
            layers[index] = _followed(layers[index], sampler, views)
        return self.run(layers, embeddings, cache, last_only)


def _followed(layer: Layer, sampler: nn.Module, views: Views) -> Layer:
    """A layer after which those positions look."""
    positions = mx.array(views.positions)

    def both(x: mx.array, mask: Mask, cache: Cache | None, last_only: bool = False) -> mx.array:
        x = layer(x, mask, cache)
        before = x[0, positions]
        after = sampler(before, views.seen)
        if views.looking is not None:
            after = mx.where(views.looking[:, None], after, before)
        x[0, positions] = after
        return x[:, -1:] if last_only else x

    return both
