"""MIL operations in one dtype, channels first, on values that may be held smaller than they are.

A site is a stretch of the network whose values are all held smaller by one power of two: a stage's
residual stream, say. Convolutions absorb the power in their weights, so that entering and leaving a
site costs nothing; what is not linear takes true values only. Weights come as float32 arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..part import UnexportableError
from .toolkit import tools

SMALLEST = 2.0**-24  # of float16 above zero
GELU = {
    "gelu": "EXACT",
    "gelu_pytorch_tanh": "TANH_APPROXIMATION",
    "quick_gelu": "SIGMOID_APPROXIMATION",  # x * sigmoid(1.702 x)
}


def numpy(array: mx.array) -> np.ndarray:
    """A parameter in float32."""
    return np.array(array.astype(mx.float32))


@dataclass(frozen=True)
class Value:
    """var * 2 ** power is the true value; site says where it lies, None where it is true."""

    var: Any
    power: int = 0
    site: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a MIL variable, static."""
        return tuple(self.var.shape)


@dataclass
class Network:
    """Emits operations into the program that is being built.

    powers: by site, the power of two that its values are held smaller by. sites: of each operation
    at a site, the site and the degree in which its values grow with it (2 where they are squared).
    split_heads: attention head by head.
    """

    half: bool
    powers: Mapping[str, int] = field(default_factory=dict)
    split_heads: bool = False
    sites: dict[str, tuple[str, int]] = field(default_factory=dict)

    def const(self, array: np.ndarray | float) -> np.ndarray:
        """An array in the program's dtype. Raises UnexportableError when float16 cannot hold it."""
        wide = np.asarray(array, np.float32)
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16 if self.half else np.float32)
        if not np.isfinite(narrow).all():
            largest = float(np.abs(wide).max())
            raise UnexportableError(
                f"a weight of {largest:.3g} does not fit in float16",
                "use --precision fp32", wider=True,
            )  # fmt: skip
        return narrow

    def value(self, var: Any, site: str | None = None, degree: int = 1) -> Value:
        """What an operation gave, at a site."""
        if site is None:
            return Value(var)
        self.sites[var.name] = (site, degree)
        return Value(var, self.powers.get(site, 0) * degree, site)

    def conv(
        self,
        x: Value,
        weight: np.ndarray,
        bias: np.ndarray | None,
        name: str,
        site: str | None = None,
        *,
        stride: int = 1,
        groups: int = 1,
        pad: int = 0,
    ) -> Value:
        """weight [out, in / groups, k, k], of the true function; the result lies at `site`."""
        power = self.powers.get(site, 0) if site else 0
        shared: dict[str, Any] = {}
        if bias is not None:
            shared["bias"] = self.const(bias * 2.0**-power)
        var = tools().mb.conv(
            x=x.var, weight=self.const(weight * 2.0 ** (x.power - power)), strides=[stride] * 2,
            pad_type="custom", pad=[pad] * 4, groups=groups, name=name, **shared,
        )  # fmt: skip
        return self.value(var, site)

    def linear(
        self,
        x: Value,
        weight: np.ndarray,
        bias: np.ndarray | None,
        name: str,
        site: str | None = None,
    ) -> Value:
        """A matmul over the channels, weight [out, in], as a 1x1 convolution."""
        return self.conv(x, weight[:, :, None, None], bias, name, site)

    def activation(self, x: Value, kind: str, name: str) -> Value:
        """One of GELU's forms."""
        return Value(tools().mb.gelu(x=_true(x), mode=GELU[kind], name=name))

    def relu(self, x: Value, name: str) -> Value:
        """max(x, 0)."""
        return Value(tools().mb.relu(x=_true(x), name=name))

    def sigmoid(self, x: Value, name: str) -> Value:
        """The logistic function."""
        return Value(tools().mb.sigmoid(x=_true(x), name=name))

    def hard_sigmoid(self, x: Value, name: str) -> Value:
        """min(max(x / 6 + 1 / 2, 0), 1)."""
        alpha, beta = self.const(1 / 6)[()], self.const(0.5)[()]
        return Value(tools().mb.sigmoid_hard(x=_true(x), alpha=alpha, beta=beta, name=name))

    def softmax(self, x: Value, axis: int, name: str) -> Value:
        """Over one axis."""
        return Value(tools().mb.softmax(x=_true(x), axis=axis, name=name))

    def matmul(
        self, x: Value, y: Value, name: str, *, x_t: bool = False, y_t: bool = False
    ) -> Value:
        """x @ y over the last two axes, either transposed."""
        var = tools().mb.matmul(
            x=_true(x), y=_true(y), transpose_x=x_t, transpose_y=y_t, name=name
        )  # fmt: skip
        return Value(var)

    def add(self, x: Value, y: Value, name: str) -> Value:
        """Of two values at one site."""
        _same((x, y), name)
        return self.value(tools().mb.add(x=x.var, y=y.var, name=name), x.site)

    def add_const(self, x: Value, array: np.ndarray, name: str) -> Value:
        """An array of the shape of x, or one that broadcasts to it, of true values."""
        offset = self.const(array * 2.0**-x.power)
        return self.value(tools().mb.add(x=x.var, y=offset, name=name), x.site)

    def mul(self, x: Value, y: Value, name: str) -> Value:
        """Element by element."""
        return Value(tools().mb.mul(x=_true(x), y=_true(y), name=name))

    def scaled(self, x: Value, factor: float, name: str) -> Value:
        """x times a number."""
        return self.value(
            tools().mb.mul(x=x.var, y=self.const(factor)[()], name=name), x.site
        )  # fmt: skip

    def true(self, x: Value, name: str) -> Value:
        """The true value, by a multiplication where it is held smaller."""
        return Value(self.scaled(x, 2.0**x.power, name).var) if x.power else Value(x.var)

    def affine(
        self, x: Value, gain: np.ndarray, offset: np.ndarray, name: str, site: str | None = None
    ) -> Value:
        """x * gain + offset, channel by channel, as a 1x1 depthwise convolution."""
        C = gain.size
        return self.conv(x, gain.reshape(C, 1, 1, 1), offset, name, site, groups=C)

    def norm(self, x: Value, eps: float, name: str) -> Value:
        """LayerNorm over the channels without its gain and offset: a true value.

        What x is held smaller by goes into eps, of which float16 holds 6e-8 at the least.
        """
        mb = tools().mb
        mean = mb.reduce_mean(x=x.var, axes=[1], keep_dims=True, name=f"{name}_mean")
        self.value(mean, x.site)
        centred = self.value(mb.sub(x=x.var, y=mean, name=f"{name}_centred"), x.site).var
        squared = mb.mul(x=centred, y=centred, name=f"{name}_squared")
        self.value(squared, x.site, degree=2)
        variance = mb.reduce_mean(x=squared, axes=[1], keep_dims=True, name=f"{name}_variance")
        self.value(variance, x.site, degree=2)
        epsilon = self.const(max(eps * 4.0**-x.power, SMALLEST))[()]
        inverse = mb.rsqrt(x=variance, epsilon=epsilon, name=f"{name}_rsqrt")
        return Value(mb.mul(x=centred, y=inverse, name=name))

    def reshape(self, x: Value, shape: Sequence[int], name: str) -> Value:
        """The same numbers in another shape."""
        return self.value(tools().mb.reshape(x=x.var, shape=list(shape), name=name), x.site)

    def concat(self, values: Sequence[Value], axis: int, name: str) -> Value:
        """Of values at one site."""
        _same(values, name)
        parts = [value.var for value in values]
        joined = tools().mb.concat(values=parts, axis=axis, name=name)
        return self.value(joined, values[0].site)

    def split(self, x: Value, count: int, axis: int, name: str) -> list[Value]:
        """Equal parts along an axis."""
        parts = tools().mb.split(x=x.var, num_splits=count, axis=axis, name=name)
        return [self.value(part, x.site) for part in parts]

    def average(self, x: Value, kernel: tuple[int, int], name: str) -> Value:
        """The average of every window, which do not overlap."""
        window = {"kernel_sizes": list(kernel), "strides": list(kernel)}
        var = tools().mb.avg_pool(x=x.var, pad_type="valid", name=name, **window)
        return self.value(var, x.site)

    def tokens(self, x: Value, name: str) -> Value:
        """[1, C, h, w] -> true [1, h * w, C], row by row: the layout of features and tokens."""
        _, C, h, w = x.shape
        flat = self.reshape(self.true(x, f"{name}_true"), (1, C, h * w), f"{name}_flat")
        return Value(tools().mb.transpose(x=flat.var, perm=[0, 2, 1], name=name))


def _true(x: Value) -> Any:
    if x.power:
        raise ValueError(f"{x.var.name} is held smaller by 2 ** {x.power}")
    return x.var


def _same(values: Sequence[Value], name: str) -> None:
    if len({(value.power, value.site) for value in values}) != 1:
        raise ValueError(f"{name}: its values are not at one site")


def attention(net: Network, qkv: Value, heads: int, name: str) -> Value:
    """Full attention, q scaled already: [1, 3 * C, h, w], q, k and v by heads -> [1, C, h, w].

    All heads in one matmul, or head by head with keys before queries, as the rules for the Neural
    Engine have it (ml-stable-diffusion's SPLIT_EINSUM). Neither leaves rank 4.
    """
    _, channels, h, w = qkv.shape
    C, N = channels // 3, h * w
    if not net.split_heads:
        parts = net.reshape(qkv, (3, heads, C // heads, N), f"{name}_heads")
        q, k, v = net.split(parts, 3, 0, f"{name}_split")
        scores = net.matmul(q, k, f"{name}_scores", x_t=True)
        out = net.matmul(v, net.softmax(scores, -1, f"{name}_softmax"), f"{name}_mix", y_t=True)
        return net.reshape(out, (1, C, h, w), f"{name}_out")
    rows = net.reshape(qkv, (1, 1, channels, N), f"{name}_rows")
    parts_by_head = net.split(rows, 3 * heads, 2, f"{name}_split")
    mixed = []
    for head in range(heads):
        q, k, v = parts_by_head[head::heads]
        scores = net.matmul(k, q, f"{name}_scores_{head}", x_t=True)
        weights = net.softmax(scores, 2, f"{name}_softmax_{head}")
        mixed.append(net.matmul(v, weights, f"{name}_mix_{head}"))
    joined = net.concat(mixed, 2, f"{name}_joined")
    return net.reshape(joined, (1, C, h, w), f"{name}_out")


def affine_folded(
    weight: np.ndarray, bias: np.ndarray | None, gain: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A linear layer behind a norm's gain and offset -> the same behind the bare norm."""
    folded = weight @ offset + (0 if bias is None else bias)
    return weight * gain[None], folded


def image_folded(
    weight: np.ndarray, bias: np.ndarray | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """A first convolution [out, 3, k, k] on normalised pixels -> the same on pixels of 0..255.

    Exact where nothing is padded, and where the mean is zero.
    """
    folded = weight / (255 * np.asarray(std, np.float32))[None, :, None, None]
    shift = (weight * (np.asarray(mean, np.float32) / std)[None, :, None, None]).sum((1, 2, 3))
    return folded, (0 if bias is None else bias) - shift
