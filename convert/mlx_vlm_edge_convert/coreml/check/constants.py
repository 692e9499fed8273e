"""Compressed constants -> dense float arrays: the constexpr operations of MIL.

Source: coremltools, converters/mil/mil/ops/defs/iOS16 and iOS18, constexpr_ops.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Inputs = Mapping[str, Any]


def _spread(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every value repeated over its block: [O, G] -> [O, I] where a block is [1, I / G]."""
    for axis, size in enumerate(shape):
        if x.shape[axis] != size:
            if size % x.shape[axis]:
                raise ValueError(f"{x.shape[axis]} blocks on an axis of {size}")
            x = np.repeat(x, size // x.shape[axis], axis)
    return x


def _blockwise_shift_scale(
    data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> np.ndarray:
    """scale * (data - offset), each over blocks."""
    y = data.astype(np.float32)
    if offset is not None:
        y -= _spread(offset.astype(np.float32), data.shape)
    y *= _spread(scale.astype(np.float32), data.shape)
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
