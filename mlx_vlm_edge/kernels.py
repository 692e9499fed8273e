"""The few operations whose best form depends on the device: one function each, equal numbers.

Element-wise chains are compiled on GPUs only: on the CPU back end `mx.compile` calls a C++
compiler, which costs a second on first use and may not be installed.
"""

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx


LOG2_E = math.log2(math.e)
# 2 ** x on -0.5..0.5 as a polynomial: interpolated at Chebyshev's points, relative error 1e-7.
_EXP2 = (1.0000000755, 0.693147188, 0.2402210749, 0.0555035711, 0.0096760319, 0.0013390863)
_ROUNDING = 1.5 * 2.0**23  # added to a float32, it leaves the nearest integer in the low bits


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return bool(mx.default_device() == mx.Device(mx.DeviceType.cpu))


def _gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.erf(x * (1.0 / math.sqrt(2.0))))


def _gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _relu_squared(x: mx.array) -> mx.array:
    return mx.square(mx.maximum(x, 0))


@cache
def _compiled(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    compiled: Callable[..., mx.array] = mx.compile(function, shapeless=True)
    return compiled


def _run(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    return (function if on_cpu() else _compiled(function))(*arrays)


def gelu(x: mx.array) -> mx.array:
    """The exact (erf) GELU, any shape."""
    return _run(_gelu, x)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of GELU, as SigLIP uses it."""
    return _run(_gelu_tanh, x)


def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), as CLIP uses it."""
    return _run(_quick_gelu, x)


def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0) squared, element by element, any shape."""
    return _run(_relu_squared, x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, element by element."""
    if on_cpu() and gate.dtype == mx.float32:
        return gate * up / (1.0 + exp2(gate * -LOG2_E))
    return _run(_swiglu, gate, up)


def exp2(x: mx.array) -> mx.array:
    """2 ** x in float32 by arithmetic alone: relative error 1e-7, x outside -100..126 is clipped.

    MLX's CPU back end takes the C library's exponential one number at a time, 5 to 10 times slower.
    """
    x = mx.clip(x, -100.0, 126.0)
    shifted = x + _ROUNDING
    rest = x - (shifted - _ROUNDING)
    power = _EXP2[-1] * rest + _EXP2[-2]
    for coefficient in _EXP2[-3::-1]:
        power = power * rest + coefficient
    return mx.view(mx.view(power, mx.int32) + (mx.view(shifted, mx.int32) << 23), mx.float32)


def tall_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., K] times weight.T, for a weight [N, K] of very many rows."""
    rows, K = weight.shape
    if not on_cpu() or x.size > K or rows % _TALL_PARTS:
        return x @ weight.T
    # one row on the CPU: in parts that fit its caches 0.8 of the time
    parts = weight.reshape(_TALL_PARTS, -1, K).swapaxes(1, 2)
    return (x.reshape(1, K) @ parts).reshape(*x.shape[:-1], rows)


_TALL_PARTS = 64


def depthwise_conv2d(
    x: mx.array, weight: mx.array, bias: mx.array | None, stride: int = 1
) -> mx.array:
    """Depthwise convolution with "same" padding k // 2.

    x [B, H, W, C], weight [C, k, k, 1], bias [C] -> [B, ceil(H / stride), ceil(W / stride), C].
    """
    channels, size = weight.shape[0], weight.shape[1]
    y = mx.conv2d(x, weight, stride=stride, padding=size // 2, groups=channels)
    return y if bias is None else y + bias


def resize_bilinear(x: mx.array, height: int, width: int) -> mx.array:
    """[H, W, C] -> [height, width, C], as torch's interpolate: bilinear, align_corners False.

    No smoothing when it shrinks: each result is a mix of its four nearest. Computed in float32.
    """
    low, high, weight = _neighbours(x.shape[0], height)
    rows = x[low].astype(mx.float32)
    rows = rows + (x[high].astype(mx.float32) - rows) * weight[:, None, None]
    low, high, weight = _neighbours(x.shape[1], width)
    mixed = rows[:, low] + (rows[:, high] - rows[:, low]) * weight[:, None]
    return mixed.astype(x.dtype)


def _neighbours(size: int, out: int) -> tuple[mx.array, mx.array, mx.array]:
    """For each of `out` samples of a line of `size`: the one before, the one after, its weight.

    _neighbours(4, 2) -> [0, 2], [1, 3], [0.5, 0.5]: samples lie at (i + 0.5) * 4 / 2 - 0.5.
    """
    places = [max((i + 0.5) * size / out - 0.5, 0.0) for i in range(out)]
    low = [min(int(place), size - 1) for place in places]
    high = [min(place + 1, size - 1) for place in low]
    weight = [place - before for place, before in zip(places, low, strict=True)]
    return mx.array(low), mx.array(high), mx.array(weight)


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """softmax(scale * q k^T) v: q [B, heads, L, D], k and v [B, kv_heads, S, D] -> as q.

    mask: "causal" (the last query sees all S keys), bool (True: seen) or additive, both
    broadcastable to [B, heads, L, S]. Several heads may share a key head.
    """
    if not on_cpu() or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    L, S = q.shape[2], k.shape[2]
    parts = []
    for start in range(0, L, _QUERIES):
        rows = slice(start, min(start + _QUERIES, L))
        seen = S - L + rows.stop if mask == "causal" else S
        parts.append(
            _attention(
                q[:, :, rows], k[:, :, :seen], v[:, :, :seen], scale, _rows_of(mask, rows, seen)
            )
        )
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


_QUERIES = 64  # rows of scores that the CPU computes at once: in its cache, and causal ones shorter


def _rows_of(mask: mx.array | str | None, rows: slice, seen: int) -> mx.array | None:
    """What to add to the scores of some queries; None when they see everything."""
    if mask is None:
        return None
    if isinstance(mask, str):
        L = rows.stop - rows.start
        part = mx.arange(seen - L, seen)[:, None] >= mx.arange(seen) if L > 1 else None
    else:
        part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    if part is None or part.dtype != mx.bool_:
        return part
    return mx.where(part, 0.0, -1e30)


def _attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention of a few queries, all heads that share keys in one matmul."""
    B, heads, L, D = q.shape
    kv_heads, S = k.shape[1:3]
    scaled = (q * (scale * LOG2_E)).reshape(B, kv_heads, -1, D)
    scores = (scaled @ k.swapaxes(-1, -2)).reshape(B, heads, L, S)
    if mask is not None:
        scores = scores + mask * LOG2_E
    weights = exp2(scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights.reshape(B, kv_heads, -1, S) @ v).reshape(B, heads, L, D)
    return mixed / weights.sum(axis=-1, keepdims=True)
