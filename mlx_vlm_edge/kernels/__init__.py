"""The few operations whose best form depends on the device: one function each, equal numbers.

`forms` chooses: MLX's own kernels on Metal and CUDA (gpu.py), other ones on the CPU back end
(cpu.py). Nothing is compiled on the CPU, which would call a C++ compiler for a second or two and
gain a tenth. Feature maps are [B, H, W, C] everywhere; on the CPU they lie channels-first
in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn

from . import cpu, gpu
from .dense import Dense as Dense
from .dense import Layer as Layer
from .dense import by_output as by_output
from .gpu import Activation as Activation
from .gpu import Mask as Mask

LINES = 64  # lengths of a bilinear resize whose tables are remembered
_plain: ContextVar[bool] = ContextVar("plain", default=False)


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return bool(mx.default_device() == mx.Device(mx.DeviceType.cpu))


@contextmanager
def plain() -> Iterator[None]:
    """MLX's own kernels on every device and nothing compiled: each operation is one call of MLX."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def forms() -> ModuleType:
    """The module of this device's forms."""
    return cpu if on_cpu() and not _plain.get() else gpu


def pictures_on_device() -> bool:
    """Whether pictures are resized by `banded.py` on the device, rather than by Pillow."""
    return forms() is gpu


def compiled(
    function: Callable[..., mx.array], state: nn.Module | None = None
) -> Callable[..., mx.array]:
    """`function` as one graph for each shape, where MLX compiles; `state` has what it reads.

    On the CPU it runs as it is.
    """
    whole = mx.compile(function, inputs=state)
    return lambda *arrays: (function if on_cpu() or _plain.get() else whole)(*arrays)


def gelu(x: mx.array) -> mx.array:
    """The exact (erf) GELU, any shape."""
    return forms().gelu(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of GELU, as SigLIP uses it."""
    return forms().gelu_tanh(x)


def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), as CLIP uses it."""
    return forms().quick_gelu(x)


def relu_squared(x: mx.array) -> mx.array:
    """max(x, 0) squared, element by element, any shape."""
    return forms().relu_squared(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, element by element."""
    return forms().swiglu(gate, up)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask = None) -> mx.array:
    """softmax(scale * q k^T + mask) v, softmax in float32.

    q [B, heads, L, D], k and v [B, heads or fewer, S, D] -> [B, heads, L, D]. mask: "causal" (the
    last query sees all S keys), bool (True is seen) or added, broadcastable to [B, heads, L, S].
    """
    return forms().attention(q, k, v, scale, mask)


def tall_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x W^T of x [..., K] and a weight [N, K] of very many rows, as an output head is."""
    return forms().tall_matmul(x, weight)


def pointwise(x: mx.array, layer: Layer, activation: Activation | None = None) -> mx.array:
    """A 1x1 convolution of a feature map: activation(layer(x)), [B, H, W, C] -> [B, H, W, D]."""
    return forms().pointwise(x, layer, activation)


def mlp(x: mx.array, fc1: Layer, fc2: Layer, activation: Activation) -> mx.array:
    """fc2(activation(fc1(x))), [B, ..., C] -> [B, ..., D]."""
    return forms().mlp(x, fc1, fc2, activation)


def add(x: mx.array, y: mx.array) -> mx.array:
    """x + y of two feature maps [B, H, W, C]."""
    return forms().add(x, y)


def conv2d(
    x: mx.array, weight: mx.array, bias: mx.array, stride: int, activation: Activation
) -> mx.array:
    """activation(convolution) with "same" padding k // 2.

    x [B, H, W, C], weight [D, k, k, C], bias [D] -> [B, ceil(H / stride), ceil(W / stride), D].
    """
    return forms().conv2d(x, weight, bias, stride, activation)


def depthwise_conv2d(
    x: mx.array,
    weights: Sequence[mx.array],
    bias: mx.array | None,
    stride: int = 1,
    activation: Activation | None = None,
) -> mx.array:
    """activation(depthwise convolution) with "same" padding k // 2 and m outputs per channel.

    x [B, H, W, C], m weights [C, k, k, 1], bias [m * C] -> [B, ceil(H / stride), ceil(W / stride),
    m * C]: all first outputs, then all second ones. A grouped convolution with several outputs per
    group leaves MLX's fast kernels, m depthwise ones do not.
    """
    return forms().depthwise_conv2d(x, weights, bias, stride, activation)


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


@lru_cache(LINES)
def _neighbours(size: int, out: int) -> tuple[mx.array, mx.array, mx.array]:
    """For each of `out` samples of a line of `size`: the one before, the one after, its weight;
    made once for each shape.

    _neighbours(4, 2) -> [0, 2], [1, 3], [0.5, 0.5]: samples lie at (i + 0.5) * 4 / 2 - 0.5.
    """
    places = [max((i + 0.5) * size / out - 0.5, 0.0) for i in range(out)]
    low = [min(int(place), size - 1) for place in places]
    high = [min(place + 1, size - 1) for place in low]
    weight = [place - before for place, before in zip(places, low, strict=True)]
    return mx.array(low), mx.array(high), mx.array(weight)
