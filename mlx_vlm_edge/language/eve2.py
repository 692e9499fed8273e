"""EVE v2's decoder: Qwen2 whose every layer has a second set of weights, for visual tokens.

Norms, projections and MLP go by the kind of a position; attention is joint, and the final norm and
the head are shared. Within one pass the two kinds are held apart, so that each weight meets only
its own positions, and are put in order for attention alone. A token that is generated is text.
Source: baaivision/EVE, EVEv2, eve/model/language_model/qwen2/modeling_qwen2.py (`moe_*`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import decoder, llama
from .cache import Cache, Mask
from .llama import TextConfig


@dataclass(frozen=True)
class Kinds:
    """Where the two kinds of positions are, int[N] each, and where each position is among both."""

    text: mx.array
    visual: mx.array
    order: mx.array

    @classmethod
    def of(cls, visual: np.ndarray, length: int) -> "Kinds":
        """of([1, 2], 4): text [0, 3], visual [1, 2], order [0, 2, 3, 1]."""
        text = np.setdiff1d(np.arange(length), visual)
        order = np.argsort(np.concatenate([text, visual]))
        return cls(mx.array(text), mx.array(visual), mx.array(order))

    def split(self, x: mx.array) -> list[mx.array]:
        """[B, L, ...] -> its text and its visual positions."""
        return [x[:, self.text], x[:, self.visual]]

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """The inverse of `split`."""
        return mx.concatenate(list(parts), axis=1)[:, self.order]


class Block(llama.Block):
    """A text layer and, as `visual`, one for visual tokens; called alone it is the text layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.visual = llama.Block(config)

    def fuse(self) -> None:
        super().fuse()
        self.visual.fuse()

    def both(
        self, xs: Sequence[mx.array], kinds: Kinds, mask: Mask, cache: Cache | None
    ) -> list[mx.array]:
        """Text and visual positions [B, N, D] through the layer, attending to each other."""
        halves = (self, self.visual)
        pairs = list(zip(halves, xs, strict=True))
        each = [half.self_attn.qkv(half.input_layernorm(x)) for half, x in pairs]
        mixed = kinds.split(self.self_attn.attend(kinds.join(each), mask, cache))
        xs = [x + half.self_attn.o_proj(y) for (half, x), y in zip(pairs, mixed, strict=True)]
        return [
            x + half.mlp(half.post_attention_layernorm(x))
            for half, x in zip(halves, xs, strict=True)
        ]


class LanguageModel(decoder.LanguageModel):
    def __init__(self, config: TextConfig) -> None:
        layers = [Block(config) for _ in range(config.num_hidden_layers)]
        super().__init__(config, layers, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def blocks(self, index: int) -> list[nn.Module]:
        layer = self.model.layers[index]
        return [layer, layer.visual]

    def __call__(
        self,
        embeddings: mx.array,
        cache: Sequence[Cache] | None = None,
        last_only: bool = False,
        visual: np.ndarray | None = None,
    ) -> mx.array:
        """Logits [B, L, V] of input embeddings [B, L, D], or [B, 1, V] with `last_only`.

        visual: int[N], which of 0..L-1 are visual tokens; none without it.
        """
        if visual is None or not len(visual):
            return super().__call__(embeddings, cache, last_only)
        L = embeddings.shape[1]
        if len(visual) == L:  # without text: nothing is computed of no positions
            layers = [layer.visual for layer in self.model.layers]
            return self.run(layers, embeddings, cache, last_only)
        mask = cache[0].make_mask(L) if cache else ("causal" if L > 1 else None)
        kinds = Kinds.of(visual, L)
        xs = kinds.split(embeddings)
        for index, layer in enumerate(self.model.layers):
            xs = layer.both(xs, kinds, mask, cache[index] if cache else None)
        x = kinds.join(xs)
        return self.head(x[:, -1:] if last_only else x)
