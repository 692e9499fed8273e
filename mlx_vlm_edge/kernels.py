"""The few operations whose best form depends on the device: one function each, equal numbers.

Element-wise chains are compiled on GPUs only: on the CPU back end `mx.compile` calls a C++
compiler, which costs a second on first use and may not be installed.
"""

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx


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
    return _run(_swiglu, gate, up)


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
