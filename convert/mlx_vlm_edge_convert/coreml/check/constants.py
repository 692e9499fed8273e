"""Compressed constants -> dense float arrays: the constexpr operations of MIL.

Source: coremltools, converters/mil/mil/ops/defs/iOS16 and iOS18, constexpr_ops.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Inputs = Mapping[str, Any]


def _by_block(x: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """A view with two axes for each, blocks and what is in one: [O, I] -> [O, 1, G, I / G]."""
    for size, count in zip(x.shape, blocks, strict=True):
        if size % count:
            raise ValueError(f"{count} blocks on an axis of {size}")
    pairs = ((count, size // count) for size, count in zip(x.shape, blocks, strict=True))
    return x.reshape([side for pair in pairs for side in pair])


def _blockwise_shift_scale(
    data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    """scale * (data - offset), each over blocks."""
    y = data.astype(np.float32)
    for each, apply in ((offset, np.subtract), (scale, np.multiply)):
        if each is not None:
            whole = _by_block(y, each.shape)  # of y itself
            apply(whole, _by_block(each.astype(np.float32), each.shape), out=whole)
    return y


def _affine_dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: Any
) -> np.ndarray:
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    zero, scales = (
        x.astype(np.float32).reshape(shape if x.ndim else ()) for x in (zero_point, scale)
    )
    return (quantized_data.astype(np.float32) - zero) * scales


def _lut_to_dense(
    indices: np.ndarray, lut: np.ndarray, vector_axis: Any = None, shape: Any = None
) -> np.ndarray:
    """lut [*blocks, entries, width] -> each index replaced by its block's entry."""
    if lut.ndim != indices.ndim + 2:
        raise ValueError("a look-up table of iOS 16")
    blocks = lut.shape[:-2]
    out = np.empty((*indices.shape, lut.shape[-1]), np.float32)
    for place in np.ndindex(*blocks):
        part = tuple(
            slice(i * size // count, (i + 1) * size // count)
            for i, size, count in zip(place, indices.shape, blocks, strict=True)
        )
        out[part] = lut[place].astype(np.float32)[indices[part]]
    if lut.shape[-1] == 1:
        return out[..., 0]
    axis = int(vector_axis) % indices.ndim
    dense = list(indices.shape)
    dense[axis] *= lut.shape[-1]
    return np.moveaxis(out, -1, axis + 1).reshape(dense)


def _sparse_to_dense(nonzero_data: np.ndarray, mask: np.ndarray) -> np.ndarray:
    y = np.zeros(mask.shape, nonzero_data.dtype)
    y[mask.astype(np.bool_)] = nonzero_data
    return y


def _cast(source_val: np.ndarray, output_dtype: str) -> np.ndarray:
    return source_val.astype({"fp16": np.float16, "fp32": np.float32}[output_dtype])


DECOMPRESS: dict[str, Callable[..., np.ndarray]] = {
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_sparse_to_dense": _sparse_to_dense,
    "constexpr_cast": _cast,
}
