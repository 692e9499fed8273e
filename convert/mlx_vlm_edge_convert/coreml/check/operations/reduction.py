"""Over axes: sums and means, softmax, norms."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .parallel import each

BLOCK = 1 << 15  # elements: chains run block by block, in the cache
Axes = np.ndarray | None


def axes_of(axes: Axes) -> tuple[int, ...] | None:
    return None if axes is None else tuple(int(axis) for axis in np.ravel(axes))


def _over_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduced(x: np.ndarray, axes: Axes = None, keep_dims: Any = False) -> Any:
        return function(x, axis=axes_of(axes), keepdims=bool(keep_dims))

    return reduced


def _square_sum(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return np.sum(np.square(x), axis=axis, keepdims=keepdims)


def _l2_norm(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return np.sqrt(_square_sum(x, axis, keepdims))


def argmax(
    x: np.ndarray, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32"
) -> np.ndarray:
    return np.argmax(x, axis=int(axis), keepdims=bool(keep_dims)).astype(output_dtype)


def softmax(x: np.ndarray, axis: Any = -1) -> np.ndarray:
    """Along the last axis by rows that stay in the cache."""
    if int(axis) % x.ndim < x.ndim - 1 or not x.size:
        return _softmax(x, int(axis))
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    out, count = np.empty_like(rows), max(1, BLOCK // x.shape[-1])

    def some(first: int) -> None:
        out[first : first + count] = _softmax(rows[first : first + count], -1)

    each(some, range(0, len(rows), count))
    return out.reshape(x.shape)


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    y = x - x.max(axis=axis, keepdims=True)
    np.exp(y, out=y)
    y /= y.sum(axis=axis, keepdims=True)
    return y


def layer_norm(
    x: np.ndarray, axes: Axes = None, gamma: Axes = None, beta: Axes = None, epsilon: Any = 1e-5
) -> np.ndarray:
    over = tuple(axis % x.ndim for axis in axes_of(axes) or range(x.ndim))
    centred = x - x.mean(axis=over, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(axis=over, keepdims=True) + np.float32(epsilon))
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _per_channel(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def instance_norm(
    x: np.ndarray, gamma: Axes = None, beta: Axes = None, epsilon: Any = 1e-5
) -> np.ndarray:
    y = layer_norm(x, np.arange(2, x.ndim), epsilon=epsilon)
    y = y if gamma is None else y * _per_channel(x, gamma)
    return y if beta is None else y + _per_channel(x, beta)


def batch_norm(
    x: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    gamma: Axes = None,
    beta: Axes = None,
    epsilon: Any = 1e-5,
) -> np.ndarray:
    scale = 1 / np.sqrt(variance + np.float32(epsilon))
    y = (x - _per_channel(x, mean)) * _per_channel(x, scale)
    y = y if gamma is None else y * _per_channel(x, gamma)
    return y if beta is None else y + _per_channel(x, beta)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "reduce_mean": _over_axes(np.mean),
    "reduce_sum": _over_axes(np.sum),
    "reduce_max": _over_axes(np.max),
    "reduce_min": _over_axes(np.min),
    "reduce_sum_square": _over_axes(_square_sum),
    "reduce_l2_norm": _over_axes(_l2_norm),
    "reduce_argmax": argmax,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
}
