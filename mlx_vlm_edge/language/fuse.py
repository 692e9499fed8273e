"""Several linear layers on the same input -> one matmul, where their quantisation agrees."""

from collections.abc import Sequence
from itertools import accumulate
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn

from ..kernels.low_rank import Columns


def fuse(block: nn.Module, names: Sequence[str], whole: str) -> None:
    """Merge a block's layers into one, named `whole`; they stay as they are when they differ.

    Where each one's outputs are in it stands in the block's `_fused`: {name: (whole, columns)}.
    """
    layers = [block[name] for name in names]
    fused = _fused(layers)
    if fused is None:
        return
    ends = list(accumulate(layer.weight.shape[0] for layer in layers))
    for name in names:
        del block[name]
    block[whole] = fused
    places = zip(names, [0, *ends[:-1]], ends, strict=True)
    # A dict would be parameters.
    block._fused = MappingProxyType(
        {name: (whole, Columns(start, end, ends[-1])) for name, start, end in places}
    )


def _fused(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One layer whose output is the outputs of `layers` side by side, or None when they differ.

    All must be Linear, or all QuantizedLinear of the same bits, group size and mode; and all or
    none of them have a bias.
    """
    if len({frozenset(layer.parameters()) for layer in layers}) > 1:
        return None
    first = layers[0]
    if all(type(layer) is nn.Linear for layer in layers):
        fused = nn.Linear(first.weight.shape[1], 1, bias="bias" in first)
    elif all(type(layer) is nn.QuantizedLinear for layer in layers):
        kinds = {(layer.bits, layer.group_size, layer.mode) for layer in layers}
        if len(kinds) > 1:
            return None
        bits, group_size, mode = kinds.pop()
        inputs = first.weight.shape[1] * 32 // bits
        fused = nn.QuantizedLinear(
            inputs, 32, "bias" in first, group_size=group_size, bits=bits, mode=mode
        )
    else:
        return None
    for name in first.parameters():
        fused[name] = mx.concatenate([layer[name] for layer in layers], axis=0)
    return fused
