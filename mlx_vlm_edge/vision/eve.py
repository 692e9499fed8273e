"""EVE's patch embedding layers, which stand in for a vision encoder: pixels -> visual tokens.

Any grid of patches is taken. A class token comes first, and every row of tokens ends with a split
token, which with the order carries the layout: there are no position embeddings.
Source: baaivision/EVE, EVEv1 and EVEv2, eve/model/multimodal_encoder/vision_tokenizer.py.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import UsageError
from ..kernels import gelu

HEADS = 8  # of both cross-attentions, whatever the width


@dataclass(frozen=True)
class PatchConfig:
    """width: channels of a patch. patch: its side in pixels. window: patches along a token's."""

    width: int
    patch: int
    window: int

    @property
    def stride(self) -> int:
        """Pixels along a token's side."""
        return self.patch * self.window


def in_rows(tokens: mx.array, first: mx.array, last: mx.array) -> mx.array:
    """Tokens [h, w, C] as a sequence [1 + h * (w + 1), C]: `first`, then rows that end in `last`.

    [[a, b], [c, d]] -> [first, a, b, last, c, d, last]
    """
    h, _, C = tokens.shape
    ends = mx.broadcast_to(last, (h, 1, C))
    rows = mx.concatenate([tokens, ends], axis=1).reshape(-1, C)
    return mx.concatenate([first.reshape(1, C), rows])


class CrossAttention(nn.Module):
    """One query per group over that group's features: [G, C], [G, n, C] -> [G, C].

    The scale is that of the whole width, C ** -0.5, not of a head.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % HEADS:
            raise UsageError(f"config.json: mm_hidden_size {width} is no multiple of {HEADS}")
        self.q = [nn.LayerNorm(width), nn.Linear(width, width, bias=False)]
        self.kv = [nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False)]
        self.proj = nn.Linear(width, width)

    def __call__(self, query: mx.array, features: mx.array) -> mx.array:
        G, n, C = features.shape
        q = self.q[1](self.q[0](query)).reshape(G, 1, HEADS, -1).swapaxes(1, 2)
        kv = self.kv[1](self.kv[0](features)).reshape(G, n, 2, HEADS, -1)
        k, v = kv.transpose(2, 0, 3, 1, 4)  # each [G, heads, n, D]
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=C**-0.5)
        return query + self.proj(out.reshape(G, C))


class PatchEmbedding(nn.Module):
    """EVE v1: patches, pooled in windows that attend to their own patches; a class token that
    attends to all tokens.

    The original computes on a padded square canvas and crops the patches to the picture; the
    picture alone gives the same.
    """

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.window = config.window
        self.patch_embedding = nn.Conv2d(
            3, config.width, config.patch, stride=config.patch, bias=False
        )
        self.class_embedding = mx.zeros((config.width,))
        self.split_embedding = mx.zeros((config.width,))
        self.local_attention = CrossAttention(config.width)
        self.global_attention = CrossAttention(config.width)

    def __call__(self, x: mx.array) -> mx.array:
        """Normalised pixels [1, H, W, 3] -> [1 + h * (w + 1), C]."""
        patches = self.patch_embedding(x)[0]
        n, C = self.window, patches.shape[-1]
        h, w = patches.shape[0] // n, patches.shape[1] // n
        patches = patches[: h * n, : w * n]  # of sizes that are not whole windows, as the original
        windows = patches.reshape(h, n, w, n, C).swapaxes(1, 2).reshape(h * w, n * n, C)
        tokens = self.local_attention(windows.mean(axis=1), windows)
        first = self.global_attention(self.class_embedding[None], tokens[None])
        return in_rows(tokens.reshape(h, w, C), first, self.split_embedding)


class ConvPatchEmbedding(nn.Module):
    """EVE v2: two convolutions straight to the decoder's width."""

    def __init__(self, config: PatchConfig, hidden_size: int) -> None:
        super().__init__()
        patch, window = config.patch, config.window
        self.patch_embedding = [
            nn.Conv2d(3, config.width, patch, stride=patch),
            nn.GELU(),
            nn.Conv2d(config.width, hidden_size, window, stride=window),
        ]
        self.class_embedding = mx.zeros((hidden_size,))
        self.split_embedding = mx.zeros((hidden_size,))

    def __call__(self, x: mx.array) -> mx.array:
        """Normalised pixels [1, H, W, 3] -> [1 + h * (w + 1), D]."""
        patches, _, dense = self.patch_embedding
        tokens = dense(gelu(patches(x)))[0]
        return in_rows(tokens, self.class_embedding, self.split_embedding)
