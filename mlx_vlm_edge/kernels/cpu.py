"""The forms for MLX's CPU back end: matmuls and short chains of arithmetic, a cacheful at a time.

Its matmul is good (see blas.py); its erf, exp and grouped convolution are scalar loops, ten times
slower than what stands here, and a fresh array above 32 MB costs a page fault for every page.
Feature maps keep their shape [B, H, W, C] but lie channels-first in memory: matmuls read and write
both orders equally well, and a depthwise convolution needs whole rows of one channel.
All of this is for float32; half precision, slow here anyway, takes the other forms: its sums would
be rounded at every step.
"""

import math
from collections.abc import Sequence

import mlx.core as mx

from . import gpu
from .dense import Layer, by_output
from .gpu import Activation, Mask

CACHEFUL = 1 << 18  # elements: 1 MB, half of an ordinary second-level cache and more
TILE = 8  # results along a row that one small matmul of a depthwise convolution gives
QUERIES = 64  # of causal attention at a time
TALL = 64  # parts that the output head is multiplied in
PACKED = 256  # columns below which a matmul spends its time on repacking the weights

# 1 + erf(t / sqrt(2)) = 2 - 2 / P(t) ** 16 for t >= 0, within 5e-7. Fitted to least
# error of GELU, highest power first; tests/tools/fit_gelu.py gives these numbers.
GELU = (
    6.988018265853546e-06, 3.964918124179165e-05, 7.532232287732823e-05, 0.003370510559822619,
    0.02211371673825835, 0.05206397800213319, 1.0442748411209124,
)  # fmt: skip
# 2 ** f for -1/2 <= f <= 1/2, Taylor's, within 2e-8.
EXP2 = tuple(math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1))


def _polynomial(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    result = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


def _after(x: mx.array, done: list[mx.array]) -> mx.array:
    """x, to be used no sooner than the last of `done` is there: few parts are alive at once."""
    return mx.depends(x, done[-1]) if done else x


def _by_parts(function: Activation, x: mx.array, size: int, axis: int) -> mx.array:
    """`function` of at most `size` at a time along an axis that it keeps."""
    if x.shape[axis] <= size:
        return function(x)
    done: list[mx.array] = []
    for part in mx.split(x, range(size, x.shape[axis], size), axis):
        done.append(function(_after(part, done)))
    return mx.concatenate(done, axis)


def _by_cachefuls(function: Activation, x: mx.array) -> mx.array:
    if x.size <= 2 * CACHEFUL:
        return function(x)
    return _by_parts(function, x.flatten(), CACHEFUL, 0).reshape(x.shape)


def exp2(x: mx.array) -> mx.array:
    """2 ** x in float32, relative error below 1e-7 + |x| * 6e-8; 2 ** -100 below x = -100.

    What softmax hides stays a normal number so: some processors are slow at denormal ones.
    """
    x = mx.clip(x, -100.0, 127.0)
    exponent = (x + 127.5).astype(mx.int32)  # of 2 ** (nearest integer), as float32 holds it
    rest = x - (exponent.astype(mx.float32) - 127.0)
    return _polynomial(rest, EXP2) * (exponent << 23).view(mx.float32)


def _silu(x: mx.array) -> mx.array:
    return x / (1.0 + exp2(x * -math.log2(math.e)))


def _gelu(x: mx.array) -> mx.array:
    t = mx.abs(x)
    power = _polynomial(t, GELU)
    for _ in range(4):
        power = mx.square(power)
    return (x + t) * 0.5 - t / power  # the first is max(x, 0), which is a scalar loop here


def _gelu_tanh(x: mx.array) -> mx.array:
    slope = -2 * math.sqrt(2 / math.pi) * math.log2(math.e)
    return x / (1.0 + exp2(x * (slope + (slope * 0.044715) * mx.square(x))))


def gelu(x: mx.array) -> mx.array:
    return _by_cachefuls(_gelu, x) if x.dtype == mx.float32 else gpu.plain_gelu(x)


def gelu_tanh(x: mx.array) -> mx.array:
    return _by_cachefuls(_gelu_tanh, x) if x.dtype == mx.float32 else gpu.plain_gelu_tanh(x)


def quick_gelu(x: mx.array) -> mx.array:
    if x.dtype != mx.float32:
        return gpu.plain_quick_gelu(x)
    return _by_cachefuls(lambda part: _silu(part * 1.702) * (1 / 1.702), x)


def relu_squared(x: mx.array) -> mx.array:
    return gpu.plain_relu_squared(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    if gate.dtype != mx.float32:
        return gpu.plain_swiglu(gate, up)
    return _by_cachefuls(_silu, gate) * up


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    """Softmax by exp2, over several heads at a time or some of the queries of one."""
    B, heads, L, _ = q.shape
    S = k.shape[2]
    if q.dtype != mx.float32:
        return gpu.attention(q, k, v, scale, mask)
    if isinstance(mask, str) or (mask is None and L == 1):
        return _causal_attention(q, k, v, scale)
    if mask is not None:
        mask = mx.broadcast_to(mask, (B, heads, L, S))
    q = q * (scale * math.log2(math.e))
    k, v = (mx.repeat(x, heads // x.shape[1], axis=1) for x in (k.swapaxes(2, 3), v))
    together, rows = max(1, CACHEFUL // (B * L * S)), max(1, CACHEFUL // (B * S))
    done: list[mx.array] = []
    for head in range(0, heads, together):
        some = slice(head, head + together)
        for row in range(0, L, rows):
            part = (slice(None), some, slice(row, row + rows))
            scores = _after(q[part], done) @ k[:, some]
            done.append(_softmax_times(scores, None if mask is None else mask[part], v[:, some]))
    return mx.concatenate(done, axis=1 if rows >= L else 2).reshape(B, heads, L, -1)


def _causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Some queries of all heads at a time, with the keys that they see and no others."""
    B, heads, L, D = q.shape
    kv_heads, S = k.shape[1:3]
    q = q * (scale * math.log2(math.e))
    done: list[mx.array] = []
    for row in range(0, L, QUERIES):
        some = _after(q[:, :, row : row + QUERIES], done)
        n = some.shape[2]
        seen = S - L + row + n
        hidden = mx.arange(seen) > mx.arange(seen - n, seen)[:, None] if n > 1 else None
        # Heads that share keys lie together: one matmul for each key head.
        scores = some.reshape(B, kv_heads, -1, D) @ k[:, :, :seen].swapaxes(2, 3)
        if hidden is not None:
            scores = scores.reshape(B, heads, n, seen) + mx.where(hidden, -1e30, 0.0)
        scores = scores.reshape(B, kv_heads, -1, seen)
        done.append(_softmax_times(scores, None, v[:, :, :seen]).reshape(B, heads, n, D))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=2)


def _softmax_times(scores: mx.array, mask: mx.array | None, v: mx.array) -> mx.array:
    """Scores in units of log 2."""
    if mask is not None:
        hidden = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, -1e30) if hidden else scores + mask * math.log2(math.e)
    powers = exp2(scores - scores.max(axis=-1, keepdims=True))
    return (powers @ v) / powers.sum(axis=-1, keepdims=True)


def tall_matmul(x: mx.array, weight: mx.array) -> mx.array:
    """One row in parts of the weight that stay in the cache while a matmul packs them."""
    N, K = weight.shape
    if x.size > K or N % TALL:
        return gpu.tall_matmul(x, weight)
    parts = weight.reshape(TALL, -1, K).swapaxes(1, 2)
    return (x.reshape(1, K) @ parts).reshape(*x.shape[:-1], N)


def _channels_first(x: mx.array) -> mx.array:
    """[B, ..., C] -> [B, C, n]: a view where the memory lies channels-first already."""
    return mx.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1)


def _channels_last(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """[B, C, n] -> the view [*shape, C], its memory channels-first."""
    return mx.moveaxis(x.reshape(shape[0], -1, *shape[1:]), 1, -1)


def _matmul(layer: Layer, x: mx.array) -> mx.array:
    """A linear layer over the channels of [B, C, n]. The reference BLAS likes this order better."""
    y = by_output(layer) @ x
    return y + layer.bias[:, None] if "bias" in layer else y


def _per_position(function: Activation, x: mx.array, widest: int) -> mx.array:
    """A function of [B, C, n] that mixes channels only, some positions of [B, ..., C] at a time."""
    size = max(PACKED, 2 * CACHEFUL // (x.shape[0] * widest))
    return _channels_last(_by_parts(function, _channels_first(x), size, -1), x.shape[:-1])


def pointwise(x: mx.array, layer: Layer, activation: Activation | None) -> mx.array:
    if x.dtype != mx.float32:
        return gpu.pointwise(x, layer, activation)

    def some(part: mx.array) -> mx.array:
        y = _matmul(layer, part)
        return y if activation is None else activation(y)

    return _per_position(some, x, by_output(layer).shape[0])


def mlp(x: mx.array, fc1: Layer, fc2: Layer, activation: Activation) -> mx.array:
    if x.dtype != mx.float32:
        return gpu.mlp(x, fc1, fc2, activation)

    def some(part: mx.array) -> mx.array:
        return _matmul(fc2, activation(_matmul(fc1, part)))

    return _per_position(some, x, by_output(fc1).shape[0])


def add(x: mx.array, y: mx.array) -> mx.array:
    """Both lie channels-first, so that is the order that is fast to walk."""
    return mx.moveaxis(mx.moveaxis(x, -1, 1) + mx.moveaxis(y, -1, 1), 1, -1)


def conv2d(
    x: mx.array, weight: mx.array, bias: mx.array, stride: int, activation: Activation
) -> mx.array:
    """Some rows at a time."""
    if x.dtype != mx.float32:
        return gpu.conv2d(x, weight, bias, stride, activation)
    k, pad, (H, W) = weight.shape[1], weight.shape[1] // 2, x.shape[1:3]
    rows = -(-H // stride)
    size = max(1, 2 * CACHEFUL // (x.shape[0] * -(-W // stride) * weight.shape[0]))
    x = mx.pad(x, [(0, 0), (pad, pad), (0, 0), (0, 0)])
    done: list[mx.array] = []
    for row in range(0, rows, size):
        last = min(row + size, rows) - 1
        part = _after(x[:, row * stride : last * stride + k], done)
        y = activation(mx.conv2d(part, weight, stride, (0, pad)) + bias)
        done.append(mx.moveaxis(y, -1, 1))
    return mx.moveaxis(mx.concatenate(done, axis=2), 1, -1)


def depthwise_conv2d(
    x: mx.array,
    weights: Sequence[mx.array],
    bias: mx.array | None,
    stride: int,
    activation: Activation | None,
) -> mx.array:
    """Matmuls of the windows along every row with banded matrices, some channels at a time."""
    if x.dtype != mx.float32:
        return gpu.depthwise_conv2d(x, weights, bias, stride, activation)
    B, H, W, C = x.shape
    rows, columns = -(-H // stride), -(-W // stride)
    weight = mx.stack([array.squeeze(-1) for array in weights])
    biases = None if bias is None else bias.reshape(len(weights), C, 1, 1)
    maps = mx.moveaxis(x, -1, 1)
    size = max(1, 2 * CACHEFUL // (B * H * W))
    done: list[mx.array] = []
    for first in range(0, C, size):
        some = slice(first, first + size)
        y = _depthwise(_after(maps[:, some], done), weight[:, some], stride)
        y = y if biases is None else y + biases[:, some]
        done.append(y if activation is None else activation(y))
    y = mx.concatenate(done, axis=2) if len(done) > 1 else done[0]
    return mx.moveaxis(y.reshape(B, -1, rows, columns), 1, -1)


def _depthwise(x: mx.array, weight: mx.array, s: int) -> mx.array:
    """x [B, C, H, W], weight [m, C, k, k] -> [B, m, C, rows, columns], stride s.

    A row of TILE results needs `width` pixels of k rows: a block of a window, whose rows lie one
    after another in memory, so that it is one row of a matrix. The kernel is a banded matrix
    [k * width, TILE]; for k = 3, TILE = 2 a third of it is [[a, 0], [b, a], [c, b], [0, c]].
    Blocks of one matrix may not overlap: every `phases`-th row of results has a matrix of its own.
    """
    B, C, H, W = x.shape
    m, k = weight.shape[0], weight.shape[-1]
    rows, columns, pad = -(-H // s), -(-W // s), k // 2
    phases = -(-k // s)
    deep = s * phases  # rows of a block, k and what makes it a multiple of the stride
    tiles, width = -(-columns // TILE), s * (TILE - 1) + k
    blocks = -(-rows // phases) + 1  # of a window; the last one is read past by other phases
    high, wide = blocks * deep, s * (TILE * tiles - 1) + k
    below, right = max(0, high - H - pad), max(0, wide - W - pad)
    x = mx.pad(x, [(0, 0), (0, 0), (pad, below), (pad, right)])
    tall, long = x.shape[2:]
    windows = mx.contiguous(
        mx.as_strided(
            mx.contiguous(x),
            (B, C, tiles, high, width),
            (C * tall * long, tall * long, s * TILE, long, 1),
        )
    )
    one = tiles * high * width
    matrices = mx.as_strided(
        windows,
        (B, C, phases, tiles * blocks - 1, deep * width),
        (C * one, one, s * width, deep * width, 1),
    )
    bands = mx.pad(
        _banded(weight.swapaxes(0, 1), s, width), [(0, 0), (0, deep - k), (0, 0), (0, 0)]
    )
    y = matrices @ bands.reshape(C, 1, deep * width, m * TILE)
    last = m * TILE
    phase = y.shape[-2] * last
    y = mx.as_strided(
        y,
        (B, m, C, blocks - 1, phases, tiles, TILE),
        (C * phases * phase, TILE, phases * phase, last, phase, blocks * last, 1),
    )
    return y.reshape(B, m, C, -1, tiles * TILE)[..., :rows, :columns]


def _banded(weight: mx.array, step: int, width: int) -> mx.array:
    """[C, m, k, n] -> [C, k, width, m * TILE]: column t of each m holds n values from step * t on.

    Rows of width + step values, read in rows of width, are shifted by step more each time.
    """
    C, m, k, n = weight.shape
    padded = mx.pad(weight, [(0, 0)] * 3 + [(0, width + step - n)])
    copies = mx.broadcast_to(padded[..., None, :], (C, m, k, TILE, width + step))
    shifted = copies.reshape(C, m, k, -1)[..., : TILE * width].reshape(C, m, k, TILE, width)
    return shifted.transpose(0, 2, 4, 1, 3).reshape(C, k, width, m * TILE)
