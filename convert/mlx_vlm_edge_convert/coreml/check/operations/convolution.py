"""Products: convolutions [B, C, H, W] (or [B, C, W]), pooling, matrix products, attention.

A 1x1 convolution is one matrix product; a depthwise one is a sum of shifted copies, channel block
by channel block; any other gathers its windows and multiplies.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .parallel import each
from .reduction import softmax

Array = np.ndarray | None
BLOCK = 1 << 16  # elements of a channel block, so that its sums stay in the cache
WINDOWS = 1 << 25  # gathered elements at a time


def _pads(
    kind: str, pad: Array, sizes: list[int], kernel: list[int], strides: list[int]
) -> list[tuple[int, int]]:
    """Padding before and after every spatial axis."""
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom" and pad is not None:
        return [(int(before), int(after)) for before, after in np.reshape(pad, (-1, 2))]
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type {kind}")
    pads = []
    for size, k, stride in zip(sizes, kernel, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if kind == "same" else (more, less))
    return pads


def _padded(x: np.ndarray, pads: list[tuple[int, int]], value: float = 0.0) -> np.ndarray:
    if not any(before or after for before, after in pads):
        return x
    return np.pad(x, [(0, 0), (0, 0), *pads], constant_values=value)


def _ints(values: Array, default: list[int]) -> list[int]:
    return default if values is None else [int(value) for value in np.ravel(values)]


def conv(
    x: np.ndarray, weight: np.ndarray, bias: Array = None, strides: Array = None,
    pad_type: str = "valid", pad: Array = None, dilations: Array = None, groups: Any = 1,
) -> np.ndarray:  # fmt: skip
    """x [B, C, H, W], weight [O, C / groups, kh, kw]; one spatial axis is taken as H = 1."""
    if x.ndim == 3:
        wide = None if pad is None else np.concatenate([[0, 0], np.ravel(pad)])
        along = [np.array([1, *_ints(values, [1])]) for values in (strides, dilations)]
        y = conv(
            x[:, :, None], weight[:, :, None], bias, along[0], pad_type, wide, along[1], groups
        )
        return y[:, :, 0]
    steps, gaps, groups = _ints(strides, [1, 1]), _ints(dilations, [1, 1]), int(groups)
    spans = [(k - 1) * gap + 1 for k, gap in zip(weight.shape[2:], gaps, strict=True)]
    x = _padded(x, _pads(pad_type, pad, list(x.shape[2:]), spans, steps))
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(f"{x.shape[1]} channels for a weight of {weight.shape}, groups {groups}")
    if groups == 1:
        y = _dense(x, weight, spans, steps, gaps)
    elif weight.shape[1] == 1 and weight.shape[0] % groups == 0:
        y = _depthwise(x, weight, spans, steps, gaps)
    else:
        pairs = zip(np.split(x, groups, 1), np.split(weight, groups, 0), strict=True)
        y = np.concatenate([_dense(part, w, spans, steps, gaps) for part, w in pairs], axis=1)
    return y if bias is None else np.add(y, bias.reshape(-1, 1, 1), out=y)


def _grid(size: tuple[int, int], spans: list[int], steps: list[int]) -> list[int]:
    """Places of a window in a picture without padding: (5, 6), [3, 3], [2, 1] -> [2, 4]."""
    return [(side - span) // step + 1 for side, span, step in zip(size, spans, steps, strict=True)]


def _dense(
    x: np.ndarray, weight: np.ndarray, spans: list[int], steps: list[int], gaps: list[int]
) -> np.ndarray:
    B, C, H, W = x.shape
    outputs, (rows, columns) = weight.shape[0], _grid((H, W), spans, steps)
    flat = weight.reshape(outputs, -1)
    if spans == [1, 1]:
        x = x[:, :, :: steps[0], :: steps[1]]
        return np.matmul(flat, x.reshape(B, C, -1)).reshape(B, outputs, rows, columns)
    windows = sliding_window_view(x, spans, axis=(2, 3))  # [B, C, H', W', span, span]
    windows = windows[:, :, :: steps[0], :: steps[1], :: gaps[0], :: gaps[1]]
    y = np.empty((B, outputs, rows, columns), x.dtype)
    band = max(1, WINDOWS // max(1, flat.shape[1] * columns))
    for b in range(B):
        for top in range(0, rows, band):
            part = windows[b, :, top : top + band].transpose(0, 3, 4, 1, 2)
            part = part.reshape(flat.shape[1], -1)
            y[b, :, top : top + band] = (flat @ part).reshape(outputs, -1, columns)
    return y


def _depthwise(
    x: np.ndarray, weight: np.ndarray, spans: list[int], steps: list[int], gaps: list[int]
) -> np.ndarray:
    """Every channel by itself; with O = m C, channel c gives the outputs m c ... m c + m - 1."""
    B, C, H, W = x.shape
    outputs, (rows, columns) = weight.shape[0], _grid((H, W), spans, steps)
    multiple = outputs // C
    y = np.empty((B, C, multiple, rows, columns), x.dtype)
    taps = weight.reshape(C, multiple, *weight.shape[2:])
    block = max(1, BLOCK // (rows * x.shape[3]))

    def some(place: tuple[int, int]) -> None:
        b, first = place
        part = slice(first, min(first + block, C))
        for m in range(multiple):
            y[b, part, m] = _shifted_sum(x[b, part], taps[part, m], (rows, columns), steps, gaps)

    each(some, [(b, first) for b in range(B) for first in range(0, C, block)])
    return y.reshape(B, outputs, rows, columns)


def _shifted_sum(
    x: np.ndarray, taps: np.ndarray, grid: tuple[int, int], steps: list[int], gaps: list[int]
) -> np.ndarray:
    """x [C, H, W], taps [C, kh, kw] -> [C, *grid].

    With steps of 1 a shifted picture is one stretch of memory; what it has beyond a row's end is
    computed and left out.
    """
    (C, _, W), (rows, columns) = x.shape, grid
    whole = steps == [1, 1]
    width = W if whole else columns
    total, scratch = (np.zeros((C, rows, width), x.dtype) for _ in range(2))
    size = (rows - 1) * W + columns
    flat, sums, products = (array.reshape(C, -1) for array in (x, total, scratch))
    sums, products = sums[:, :size], products[:, :size]
    for i in range(taps.shape[1]):
        for j in range(taps.shape[2]):
            down, right = i * gaps[0], j * gaps[1]
            if whole:
                first = down * W + right
                shifted = flat[:, first : first + size]
                np.multiply(shifted, taps[:, i, j, None], out=products)
            else:
                shifted = x[:, down:, right:][:, : (rows - 1) * steps[0] + 1 : steps[0]]
                shifted = shifted[:, :, : (columns - 1) * steps[1] + 1 : steps[1]]
                np.multiply(shifted, taps[:, i, j, None, None], out=scratch)
            sums += products
    return total[:, :, :columns]


def _pooled(
    reduce: Callable[..., np.ndarray], x: np.ndarray, kernel: list[int], steps: list[int]
) -> np.ndarray:
    if kernel == list(x.shape[2:]):
        return reduce(x, axis=(2, 3), keepdims=True)
    windows = sliding_window_view(x, kernel, axis=(2, 3))[:, :, :: steps[0], :: steps[1]]
    return reduce(windows, axis=(4, 5))


def avg_pool(
    x: np.ndarray, kernel_sizes: np.ndarray, strides: Array = None, pad_type: str = "valid",
    pad: Array = None, exclude_padding_from_average: Any = False, ceil_mode: Any = False,
) -> np.ndarray:  # fmt: skip
    if bool(ceil_mode):
        raise ValueError("avg_pool with ceil_mode")
    kernel = _ints(kernel_sizes, [])
    steps = _ints(strides, [1] * len(kernel))
    pads = _pads(pad_type, pad, list(x.shape[2:]), kernel, steps)
    y = _pooled(np.mean, _padded(x, pads), kernel, steps)
    if bool(exclude_padding_from_average) and np.any(pads):
        ones = np.ones((1, 1, *x.shape[2:]), x.dtype)
        y = y / _pooled(np.mean, _padded(ones, pads), kernel, steps)
    return y


def max_pool(
    x: np.ndarray, kernel_sizes: np.ndarray, strides: Array = None, pad_type: str = "valid",
    pad: Array = None, ceil_mode: Any = False,
) -> np.ndarray:  # fmt: skip
    if bool(ceil_mode):
        raise ValueError("max_pool with ceil_mode")
    kernel = _ints(kernel_sizes, [])
    steps = _ints(strides, [1] * len(kernel))
    pads = _pads(pad_type, pad, list(x.shape[2:]), kernel, steps)
    return _pooled(np.max, _padded(x, pads, -np.inf), kernel, steps)


def matmul(
    x: np.ndarray, y: np.ndarray, transpose_x: Any = False, transpose_y: Any = False
) -> np.ndarray:
    x = np.swapaxes(x, -1, -2) if bool(transpose_x) else x
    y = np.swapaxes(y, -1, -2) if bool(transpose_y) else y
    return np.matmul(x, y)


def linear(x: np.ndarray, weight: np.ndarray, bias: Array = None) -> np.ndarray:
    y = np.matmul(x, weight.T)
    return y if bias is None else y + bias


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, attn_mask: Array = None
) -> np.ndarray:
    """A mask of booleans says what is seen, one of floats is added."""
    scores = np.matmul(query, np.swapaxes(key, -1, -2)) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        seen = attn_mask.dtype == np.bool_
        scores = np.where(attn_mask, scores, -np.inf) if seen else scores + attn_mask
    return np.matmul(softmax(scores.astype(np.float32)), value)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "conv": conv,
    "avg_pool": avg_pool,
    "max_pool": max_pool,
    "matmul": matmul,
    "linear": linear,
    "scaled_dot_product_attention": attention,
}
