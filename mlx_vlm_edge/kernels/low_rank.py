"""A quantised layer beside a low-rank update that its packed weights cannot take up."""

import mlx.core as mx
import mlx.nn as nn


class Linear(nn.Module):
    """factor * (base(x) + x a b) + bias, with a [in, r] and b [r, out].

    factor: DoRA's [out], or None for 1.
    """

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, factor: mx.array | None) -> None:
        super().__init__()
        self.base, self.a, self.b = base, a, b
        if factor is not None:
            self.factor = factor

    def __call__(self, x: mx.array) -> mx.array:
        y, low = self.base(x), (x @ self.a) @ self.b
        if "factor" not in self:
            return y + low
        bias = self.base.bias if "bias" in self.base else 0
        return self.factor * (y - bias + low) + bias


class Embedding(nn.Module):
    """base(ids) + a[ids] b, with a [rows, r] and b [r, width].

    As an output head it is the base alone: an update of a table is none of a head tied to it.
    """

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array) -> None:
        super().__init__()
        self.base, self.a, self.b = base, a, b

    def __call__(self, ids: mx.array) -> mx.array:
        return self.base(ids) + self.a[ids] @ self.b

    def as_linear(self, x: mx.array) -> mx.array:
        return self.base.as_linear(x)
