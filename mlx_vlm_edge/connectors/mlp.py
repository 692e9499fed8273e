"""The LLaVA MLP connector: image features [N, C] -> visual tokens [N, D]."""

import mlx.core as mx
import mlx.nn as nn

from ..kernels import gelu


class MLP(nn.Module):
    """Linear, then exact GELU and Linear up to `depth`. Names: `layers.0`, `layers.2`, ..."""

    def __init__(self, features: int, width: int, depth: int = 2) -> None:
        super().__init__()
        self.layers: list[nn.Module] = [nn.Linear(features, width)]
        for _ in range(depth - 1):
            self.layers += [nn.GELU(), nn.Linear(width, width)]

    def __call__(self, x: mx.array) -> mx.array:
        first, *rest = self.layers[::2]
        x = first(x)
        for layer in rest:
            x = layer(gelu(x))
        return x
