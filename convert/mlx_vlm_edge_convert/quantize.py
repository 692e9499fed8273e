"""Casting and quantising named weights: what `mlx.nn.quantize` does to a module, done to arrays.

Only the language model's linear layers and embeddings are quantised; the vision tower and the
connector keep their precision. Everything stays lazy.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.quantization import LANGUAGE_MODEL, PARTS
from mlx_vlm_edge.checkpoint.weights import DTYPES
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.build import TOWERS

from .rules import Arrays

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def cast(weights: Mapping[str, mx.array], dtype: str) -> Arrays:
    """The floating-point weights in another dtype, packed ones as they are.

    float16 leaves the vision tower in the source's dtype, since its activations may overflow it.
    Raises UsageError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    wanted = DTYPES[dtype]

    def convert(name: str, array: mx.array) -> mx.array:
        kept = wanted == mx.float16 and name.startswith(TOWERS)
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(wanted) if floating and not kept else array

    return {name: convert(name, array) for name, array in weights.items()}


def quantize(
    weights: Mapping[str, mx.array], bits: int, group_size: int = 64
) -> tuple[Arrays, dict[str, Any]]:
    """Quantised weights and the `quantization` block of their config.

    The block names the connector's layers, which mlx-vlm would take for quantised.
    Affine: weight uint32[out, in * bits / 32], scales and biases [out, in / group_size].
    Raises UsageError when bits or group size are not MLX's, or the group does not divide a width.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise UsageError(
            f"{bits} bits in groups of {group_size}: MLX has {_list(BITS)} bits, "
            f"groups of {_list(GROUP_SIZES)}"
        )
    packed: Arrays = {}
    for name, array in weights.items():
        if not _quantised_by_default(name, array):
            packed[name] = array
            continue
        if array.shape[-1] % group_size:
            raise UsageError(
                f"{name} is {array.shape[-1]} wide, which groups of {group_size} do not divide; "
                f"{_fitting(array.shape[-1])}"
            )
        stem = name.removesuffix("weight")
        parts = mx.quantize(array, group_size=group_size, bits=bits)
        packed |= {f"{stem}{part}": value for part, value in zip(PARTS, parts, strict=True)}
    block: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    kept = (name.removesuffix(".weight") for name in packed if _is_kept_matrix(name, packed[name]))
    return packed, block | dict.fromkeys(kept, False)


def _quantised_by_default(name: str, array: mx.array) -> bool:
    """A linear layer or an embedding of the language model."""
    return name.startswith(LANGUAGE_MODEL) and _is_matrix(name, array)


def _is_kept_matrix(name: str, array: mx.array) -> bool:
    """A linear layer of the connector."""
    return not name.startswith((LANGUAGE_MODEL, *TOWERS)) and _is_matrix(name, array)


def _is_matrix(name: str, array: mx.array) -> bool:
    floating = mx.issubdtype(array.dtype, mx.floating)
    return name.endswith(".weight") and array.ndim == 2 and bool(floating)


def _fitting(width: int) -> str:
    fitting = [size for size in GROUP_SIZES if width % size == 0]
    return f"use --group-size {' or '.join(map(str, fitting))}" if fitting else "leave out --bits"


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
