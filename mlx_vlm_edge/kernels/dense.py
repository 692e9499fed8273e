"""A linear layer [..., in] -> [..., out] whose weight lies [in, out].

A matmul reads it as it is; nn.Linear's [out, in] costs a transpose node per layer in every graph.
"""

from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn


class Dense(nn.Module):
    """x @ weight + bias."""

    def __init__(self, inner: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros((inner, out))
        if bias:
            self.bias = mx.zeros((out,))

    def __call__(self, x: mx.array) -> mx.array:
        if "bias" in self:
            return mx.addmm(self.bias, x, self.weight)
        return x @ self.weight


Layer: TypeAlias = Dense | nn.Linear


def by_output(layer: Layer) -> mx.array:
    """The weight as [out, in], of either kind of layer."""
    return layer.weight.T if isinstance(layer, Dense) else layer.weight
