"""A layer beside a low-rank update that its weights do not take up: packed ones cannot, and shared
ones must not."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Columns:
    """Which outputs of a fused layer are those of a layer that went into it, of `width` in all."""

    start: int
    end: int
    width: int


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

    def beside(self, base: nn.Module) -> "Linear":
        """The same update of another form of its layer."""
        return Linear(base, self.a, self.b, self.get("factor"))


def beside_fused(base: nn.Module, updates: Sequence[tuple[Columns, Linear]]) -> Linear:
    """Updates of some of the layers that were fused into `base`, as one of it.

    Of others' outputs the update is 0, and the factor 1.
    """
    padding = [(columns.start, columns.width - columns.end) for columns, _ in updates]
    b = [mx.pad(u.b, [(0, 0), pad]) for pad, (_, u) in zip(padding, updates, strict=True)]
    factor: mx.array | None = None
    for pad, (_, update) in zip(padding, updates, strict=True):
        if "factor" in update:
            own = mx.pad(update.factor, pad, constant_values=1)
            factor = own if factor is None else factor * own
    a = mx.concatenate([update.a for _, update in updates], axis=1)
    return Linear(base, a, mx.concatenate(b), factor)


class Embedding(nn.Module):
    """factor * (base(ids) + a[ids] b), with a [rows, r] and b [r, width].

    factor: DoRA's [rows], or None for 1. tied: whether an output head that is the table has the
    update too; without, it is the base alone.
    """

    def __init__(
        self,
        base: nn.Module,
        a: mx.array,
        b: mx.array,
        factor: mx.array | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.base, self.a, self.b, self.tied = base, a, b, tied
        if factor is not None:
            self.factor = factor

    def __call__(self, ids: mx.array) -> mx.array:
        rows = self.base(ids) + self.a[ids] @ self.b
        return self.factor[ids][..., None] * rows if "factor" in self else rows

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.base.as_linear(x)
        if not self.tied:
            return y
        y = y + (x @ self.b.T) @ self.a.T
        return self.factor * y if "factor" in self else y

    def beside(self, base: nn.Module) -> "Embedding":
        """The same update of another form of its table."""
        return Embedding(base, self.a, self.b, self.get("factor"), self.tied)
