"""One operation of MIL per case: how to build it, and what numpy or MLX makes of the same."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

RNG = np.random.default_rng(7)
X = RNG.standard_normal((1, 8, 6, 10)).astype(np.float32) * 2
Y = RNG.standard_normal((1, 8, 6, 10)).astype(np.float32)


def weights(*shape):
    return RNG.standard_normal(shape).astype(np.float32) / 3


@dataclass(frozen=True)
class Case:
    """build(mb, x, y) -> a MIL value; expected: its value for X and Y."""

    build: Callable[..., Any]
    expected: np.ndarray


CASES: dict[str, Case] = {}


def case(name, build, expected):
    CASES[name] = Case(build, np.asarray(expected))


def simple(op, expected, name=None, **constants):
    case(name or op, lambda mb, x, y: getattr(mb, op)(x=x, **constants), expected)


erf = np.vectorize(math.erf)
half = X.astype(np.float64)
sigmoid = 1 / (1 + np.exp(-half))
for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "maximum": np.maximum,
                       "minimum": np.minimum, "real_div": np.divide}.items():  # fmt: skip
    case(name, lambda mb, x, y, op=name: getattr(mb, op)(x=x, y=y), function(X, Y))
for name, value in {
    "relu": np.maximum(X, 0), "sigmoid": sigmoid, "silu": X * sigmoid, "tanh": np.tanh(X),
    "exp": np.exp(X), "cos": np.cos(X), "sin": np.sin(X), "abs": np.abs(X), "square": X * X,
    "erf": erf(X), "floor": np.floor(X), "softplus": np.log1p(np.exp(half)),
}.items():  # fmt: skip
    simple(name, value)
simple("gelu", X * (1 + erf(X / math.sqrt(2))) / 2, "gelu_exact", mode="EXACT")
tanh = np.tanh(math.sqrt(2 / math.pi) * (half + 0.044715 * half**3))
simple("gelu", X * (1 + tanh) / 2, "gelu_tanh", mode="TANH_APPROXIMATION")
quick = X / (1 + np.exp(-1.702 * half))
simple("gelu", quick, "gelu_sigmoid", mode="SIGMOID_APPROXIMATION")
simple("clip", np.clip(X, -1, 0.5), alpha=-1.0, beta=0.5)
simple("sigmoid_hard", np.clip(0.2 * X + 0.5, 0, 1), alpha=0.2, beta=0.5)
positive = (X * X + 1).astype(np.float64)
case("rsqrt", lambda mb, x, y: mb.rsqrt(x=mb.add(x=mb.square(x=x), y=1.0), epsilon=0.5),
     1 / np.sqrt(positive + 0.5))  # fmt: skip
case("sqrt", lambda mb, x, y: mb.sqrt(x=mb.add(x=mb.square(x=x), y=1.0)), np.sqrt(positive))
case("log", lambda mb, x, y: mb.log(x=mb.add(x=mb.square(x=x), y=1.0)), np.log(positive))
case("pow", lambda mb, x, y: mb.pow(x=mb.add(x=mb.square(x=x), y=1.0), y=1.5), positive**1.5)
case("select", lambda mb, x, y: mb.select(cond=mb.greater(x=x, y=y), a=x, b=y), np.maximum(X, Y))
case("cast", lambda mb, x, y: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"), np.trunc(X))

simple("reduce_mean", X.mean((1, 2), keepdims=True), axes=[1, 2], keep_dims=True)
simple("reduce_sum", X.sum(-1), axes=[-1], keep_dims=False)
simple("reduce_max", X.max(1, keepdims=True), axes=[1], keep_dims=True)
simple("reduce_min", X.min(1, keepdims=True), axes=[1], keep_dims=True)
simple("reduce_sum_square", (X * X).sum(1), axes=[1])
simple("reduce_l2_norm", np.sqrt((half**2).sum(1)), axes=[1])
simple("reduce_argmax", X.argmax(-1), axis=-1)
simple("softmax", np.array(mx.softmax(mx.array(X), axis=1)), axis=1)
gamma, beta = weights(10), weights(10)
normed = mx.fast.layer_norm(mx.array(X), mx.array(gamma), mx.array(beta), 1e-3)
simple("layer_norm", np.array(normed),
       axes=[-1], gamma=gamma, beta=beta, epsilon=1e-3)  # fmt: skip
channels = [np.abs(weights(8)) + 0.5 for _ in range(4)]
mean, variance, scale, shift = (c.reshape(1, 8, 1, 1) for c in channels)
simple("batch_norm", (X - mean) / np.sqrt(variance + 1e-3) * scale + shift,
       mean=channels[0], variance=channels[1], gamma=channels[2], beta=channels[3],
       epsilon=1e-3)  # fmt: skip
simple("instance_norm", (X - X.mean((2, 3), keepdims=True))
       / np.sqrt(X.var((2, 3), keepdims=True) + 1e-3) * scale + shift,
       gamma=channels[2], beta=channels[3], epsilon=1e-3)  # fmt: skip


def conv(name, shape, strides=(1, 1), pad=(0, 0, 0, 0), dilations=(1, 1), groups=1, bias=True):
    weight, added = weights(*shape), weights(shape[0]) if bias else np.zeros(shape[0], np.float32)
    expected = mx.conv_general(
        mx.array(X).transpose(0, 2, 3, 1), mx.array(weight).transpose(0, 2, 3, 1),
        stride=list(strides), padding=([pad[0], pad[2]], [pad[1], pad[3]]),
        kernel_dilation=list(dilations), groups=groups,
    )  # fmt: skip
    case(
        name,
        lambda mb, x, y: mb.conv(
            x=x, weight=weight, strides=strides, pad_type="custom", pad=pad, dilations=dilations,
            groups=groups, **({"bias": added} if bias else {}),
        ),
        np.array(expected.transpose(0, 3, 1, 2)) + added[:, None, None],
    )  # fmt: skip


conv("conv_1x1", (12, 8, 1, 1))
conv("conv_1x1_stride", (12, 8, 1, 1), strides=(2, 2), bias=False)
conv("conv_3x3", (12, 8, 3, 3), pad=(1, 1, 1, 1))
conv("conv_uneven", (12, 8, 3, 2), strides=(2, 3), pad=(0, 1, 2, 0), dilations=(2, 1))
conv("conv_depthwise", (8, 1, 3, 5), pad=(1, 1, 2, 2), groups=8)
conv("conv_depthwise_stride", (16, 1, 3, 3), strides=(2, 2), pad=(1, 1, 1, 1), groups=8)
conv("conv_depthwise_dilated", (8, 1, 3, 3), pad=(2, 2, 2, 2), dilations=(2, 2), groups=8)
conv("conv_groups", (12, 4, 3, 3), pad=(1, 1, 1, 1), groups=2)
same = weights(4, 8, 3, 3)
case("conv_same", lambda mb, x, y: mb.conv(x=x, weight=same, strides=[2, 2], pad_type="same"),
     np.array(mx.conv_general(
         mx.array(X).transpose(0, 2, 3, 1), mx.array(same).transpose(0, 2, 3, 1), stride=2,
         padding=([0, 0], [1, 1])).transpose(0, 3, 1, 2)))  # fmt: skip
line = weights(12, 8, 3)
along = mx.conv1d(
    mx.array(X.reshape(1, 8, 60)).transpose(0, 2, 1), mx.array(line).transpose(0, 2, 1), padding=1
)
case("conv_1d", lambda mb, x, y: mb.conv(x=mb.reshape(x=x, shape=[1, 8, 60]), weight=line,
                                         pad_type="custom", pad=[1, 1]),
     np.array(along.transpose(0, 2, 1)))  # fmt: skip
simple("avg_pool", X.reshape(1, 8, 3, 2, 5, 2).mean((3, 5)), kernel_sizes=[2, 2], strides=[2, 2],
       pad_type="valid")  # fmt: skip
padded = np.pad(X, [(0, 0), (0, 0), (1, 1), (1, 1)])
sums = sum(padded[:, :, i : i + 6, j : j + 10] for i in range(3) for j in range(3))
simple("avg_pool", sums / 9, "avg_pool_padded", kernel_sizes=[3, 3], strides=[1, 1],
       pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=False)  # fmt: skip
simple("max_pool", X.reshape(1, 8, 3, 2, 5, 2).max((3, 5)), kernel_sizes=[2, 2], strides=[2, 2],
       pad_type="valid")  # fmt: skip
case("matmul", lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True), X @ Y.swapaxes(2, 3))
case("matmul_x", lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True), X.swapaxes(2, 3) @ Y)
dense, added = weights(5, 10), weights(5)
simple("linear", X @ dense.T + added, weight=dense, bias=added)
masked = np.where(np.arange(6) > np.arange(6)[:, None], -1e4, 0).astype(np.float32)
attended = mx.fast.scaled_dot_product_attention(
    mx.array(X), mx.array(Y), mx.array(Y), scale=10**-0.5, mask=mx.array(masked)
)
case("attention", lambda mb, x, y: mb.scaled_dot_product_attention(
    query=x, key=y, value=y, attn_mask=masked), np.array(attended))  # fmt: skip

simple("reshape", X.reshape(1, 8, 60), shape=[1, 8, -1])
simple("transpose", X.transpose(0, 2, 3, 1), perm=[0, 2, 3, 1])
simple("expand_dims", X[:, None], axes=[1])
simple("squeeze", X[0], axes=[0])
case("concat", lambda mb, x, y: mb.concat(values=[x, y], axis=2), np.concatenate([X, Y], 2))
both = np.stack([X, Y], 2).reshape(1, 16, 6, 10)
case("concat_interleaved", lambda mb, x, y: mb.concat(values=[x, y], axis=1, interleave=True), both)
case("stack", lambda mb, x, y: mb.stack(values=[x, y], axis=1), np.stack([X, Y], 1))
case("split", lambda mb, x, y: mb.split(x=x, split_sizes=[3, 5], axis=1)[1], X[:, 3:])
case("split_even", lambda mb, x, y: mb.split(x=x, num_splits=4, axis=1)[2], X[:, 4:6])
simple("slice_by_index", X[:, 1:-2, ::2, 3], begin=[0, 1, 1, 3], end=[0, -2, 6, 0],
       stride=[1, 1, 2, 1], begin_mask=[True, False, True, False],
       end_mask=[True, False, False, False], squeeze_mask=[False] * 3 + [True])  # fmt: skip
simple("slice_by_size", X[:, 2:5, :, 4:], begin=[0, 2, 0, 4], size=[1, 3, -1, -1])
updated = X.copy()
updated[:, 2:4, :, 3:5] = Y[:, 2:4, :, 3:5]
case("slice_update", lambda mb, x, y: mb.slice_update(
    x=x, update=mb.slice_by_index(x=y, begin=[0, 2, 0, 3], end=[1, 4, 6, 5]),
    begin=[0, 2, 0, 3], end=[1, 4, 6, 5]), updated)  # fmt: skip
simple("gather", X[:, [3, 0, 7]], indices=np.array([3, 0, 7], np.int32), axis=1)
simple("pad", np.pad(X, [(0, 0), (0, 0), (1, 2), (0, 3)], constant_values=0.5), pad=[1, 2, 0, 3],
       mode="constant", constant_val=0.5)  # fmt: skip
simple("tile", np.tile(X, (1, 2, 1, 1)), reps=[1, 2, 1, 1])
