"""The Idefics3 connector: image features -> fewer, wider ones -> visual tokens, by one matmul."""

import math

import mlx.core as mx
import mlx.nn as nn


def pixel_shuffle(x: mx.array, scale: int) -> mx.array:
    """Features [B, g * g, D] of square grids -> [B, (g / scale) ** 2, scale * scale * D].

    Every square of scale x scale features becomes one, its rows one after the other: with g = 4
    and scale = 2, feature 0 is made of 0, 1, 4, 5, and feature 1 of 2, 3, 6, 7.
    """
    B, N, D = x.shape
    side = math.isqrt(N) // scale
    x = x.reshape(B, side, scale, side, scale, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, side * side, scale * scale * D)


class PixelShuffle(nn.Module):
    def __init__(self, features: int, width: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(scale * scale * features, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Image features [B, N, C] -> visual tokens [B, N / scale ** 2, D]."""
        return self.proj(pixel_shuffle(x, self.scale))
