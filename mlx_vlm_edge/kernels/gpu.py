"""MLX's own kernels, which are the good ones on Metal and CUDA: the forms for GPUs.

They are plain MLX and run on the CPU as well, where the tests compare them with `cpu.py`.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx

from .dense import Layer

Activation = Callable[[mx.array], mx.array]
Mask = mx.array | str | None


@cache
def _compiled(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    compiled: Callable[..., mx.array] = mx.compile(function, shapeless=True)
    return compiled


def plain_gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.erf(x * (1.0 / math.sqrt(2.0))))


def plain_gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def plain_quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


def plain_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def plain_relu_squared(x: mx.array) -> mx.array:
    return mx.square(mx.maximum(x, 0))


def gelu(x: mx.array) -> mx.array:
    return _compiled(plain_gelu)(x)


def gelu_tanh(x: mx.array) -> mx.array:
    return _compiled(plain_gelu_tanh)(x)


def quick_gelu(x: mx.array) -> mx.array:
    return _compiled(plain_quick_gelu)(x)


def relu_squared(x: mx.array) -> mx.array:
    return _compiled(plain_relu_squared)(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return _compiled(plain_swiglu)(gate, up)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def tall_matmul(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


def pointwise(x: mx.array, layer: Layer, activation: Activation | None) -> mx.array:
    y = layer(x.flatten(0, -2))
    y = y if activation is None else activation(y)
    return y.reshape(*x.shape[:-1], -1)


def mlp(x: mx.array, fc1: Layer, fc2: Layer, activation: Activation) -> mx.array:
    return fc2(activation(fc1(x.flatten(0, -2)))).reshape(*x.shape[:-1], -1)


def add(x: mx.array, y: mx.array) -> mx.array:
    return x + y


def conv2d(
    x: mx.array, weight: mx.array, bias: mx.array, stride: int, activation: Activation
) -> mx.array:
    return activation(mx.conv2d(x, weight, stride, weight.shape[1] // 2) + bias)


def depthwise_conv2d(
    x: mx.array,
    weights: Sequence[mx.array],
    bias: mx.array | None,
    stride: int,
    activation: Activation | None,
) -> mx.array:
    C, k = weights[0].shape[:2]
    parts = [mx.conv2d(x, weight, stride, k // 2, groups=C) for weight in weights]
    y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    y = y if bias is None else y + bias
    return y if activation is None else activation(y)
