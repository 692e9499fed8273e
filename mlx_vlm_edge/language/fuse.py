"""Several linear layers on the same input -> one matmul, where their quantisation agrees."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn


def fuse(layers: Sequence[nn.Module]) -> nn.Module | None:
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
