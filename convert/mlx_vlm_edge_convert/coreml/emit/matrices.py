"""The decoder's matrices: what MLX holds -> what a package holds, and the same values for MLX.

MLX's affine groups, w = s q + b, become scale (data - offset) with the very same integers: no
weight is quantised again. Half of MLX's scales are negative; with q' = M - q (M the largest q) and
s' = -s they are positive. MLX chooses -b / s as an integer, in 0..M unless a group's weights have
one sign; what half precision leaves of s and b has it no more exactly. A matrix gets integers for
offsets where every group allows it, else all of its offsets stay as they are, floats.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.errors import UsageError

from ..packing import nibbles
from ..part import Bits
from .network import numpy
from .palettes import PALETTES, Palette, palette
from .toolkit import tools

GROUPS = (64, 32)
CACHED = 1 << 18  # values that are worked on at a time
WIDTHS = (4, 8)
# How far, in steps, an offset may be from the integer that stands for it: float32's rounding. What
# half precision leaves of an integer (`ROUNDING` of it) goes back onto it as well, up to MOVED.
OFF, MOVED = 2.0**-10, 2.0**-2
ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # of s and of b, together


@dataclass(frozen=True)
class Groups:
    """data uint8 [out, in] of `bits`, scale and offset float32 [out, in / group].

    whole: every offset is an integer in 0..2 ** bits - 1. moved: half precision had lost some of
    these integers, and they are restored.
    """

    data: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    bits: int
    whole: bool
    moved: bool = False

    @property
    def kind(self) -> str:
        """For the manifest."""
        return f"{self.bits} bits in groups of {self.data.shape[1] // self.scale.shape[1]}"

    @property
    def nbytes(self) -> int:
        """In a float16 package."""
        return self.data.size * self.bits // 8 + 3 * self.scale.size

    def rows(self, part: slice) -> "Groups":
        """Some of the outputs."""
        return replace(self, data=self.data[part], scale=self.scale[part], offset=self.offset[part])

    def dense(self) -> np.ndarray:
        """The weights they stand for, float32 [out, in]."""
        values = np.empty(self.data.shape, np.float32)
        split = values.reshape(*self.scale.shape, -1)  # of the values themselves
        for part in parts_of(values):
            values[part], some = self.data[part], split[part]
            some -= self.offset[part, :, None]
            some *= self.scale[part, :, None]
        return values

    def emit(self, half: bool, extra: tuple[int, ...]) -> Any:
        """A constant of MIL [out, in, *extra] that the device dequantises."""
        mb, types = tools().mb, tools().types
        kind = np.float16 if half else np.float32
        packed = types.np_uint4_dtype if self.bits == 4 else np.uint8
        shape, blocks = (*self.data.shape, *extra), (*self.scale.shape, *extra)
        return mb.constexpr_blockwise_shift_scale(
            data=self.data.view(packed).reshape(shape),  # not copied: functions share it
            scale=self.scale.astype(kind).reshape(blocks),
            offset=self.offset.astype(packed if self.whole else kind).reshape(blocks),
        )


@dataclass(frozen=True)
class Dense:
    """float16 or float32 [out, in]."""

    weight: np.ndarray

    @property
    def kind(self) -> str:
        """For the manifest."""
        return str(self.weight.dtype)

    @property
    def nbytes(self) -> int:
        """As it is."""
        return self.weight.nbytes

    def rows(self, part: slice) -> "Dense":
        """Some of the outputs."""
        return Dense(self.weight[part])

    def dense(self) -> np.ndarray:
        """The weights, float32."""
        return self.weight.astype(np.float32)

    def emit(self, half: bool, extra: tuple[int, ...]) -> Any:
        """A plain constant [out, in, *extra]."""
        kind = np.float16 if half else np.float32
        return self.weight.astype(kind, copy=False).reshape(*self.weight.shape, *extra)


@dataclass(frozen=True)
class Matrix:
    """A linear layer [out, in] as it is exported, its values those of the package's dtype."""

    weight: Dense | Groups | Palette
    bias: np.ndarray | None = None

    @property
    def outputs(self) -> int:
        """How many values it gives."""
        weight = self.weight
        return len(weight.weight if isinstance(weight, Dense) else weight.data)

    def rows(self, start: int, stop: int) -> "Matrix":
        """Some of its outputs."""
        part = slice(start, stop)
        bias = None if self.bias is None else self.bias[part]
        return Matrix(self.weight.rows(part), bias)


def packed(data: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [out, in] -> MLX's uint32 [out, in * bits / 32]; `unpacked` takes it back."""
    if bits == 4:
        data = data[:, ::2] | (data[:, 1::2] << 4)
    return np.ascontiguousarray(data).view(np.uint32)


def unpacked(weight: np.ndarray, bits: int) -> np.ndarray:
    """MLX's packed uint32 [out, words] -> uint8 [out, in], lowest bits first, for 4 and 8 bits.

    unpacked([[0x87654321]], 4) -> [[1, 2, 3, 4, 5, 6, 7, 8]]
    """
    each = np.ascontiguousarray(weight).view(np.uint8)  # little-endian, as MLX's machines are
    return each if bits == 8 else nibbles(each)


def groups(
    weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, rounding: float = 0.0
) -> Groups:
    """MLX's arrays, packed weight uint32, scales and biases float32 -> the same weights.

    rounding: relative, of a bias over a scale, from the dtype that both were stored in.
    """
    data, largest = unpacked(weight, bits), (1 << bits) - 1
    data = data if data.flags.writeable else data.copy()
    scales, biases = scales.astype(np.float64), biases.astype(np.float64)
    split = data.reshape(*scales.shape, -1)  # of the data itself
    _fill_flat(split, scales, biases)
    steps = np.divide(np.abs(biases), np.abs(scales), out=0 * biases, where=scales != 0)
    negative = scales < 0
    split ^= np.where(negative, np.uint8(largest), np.uint8(0))[..., None]  # largest - q
    biases = np.where(negative, biases + scales * largest, biases)
    scales = np.abs(scales)
    offset = np.divide(-biases, scales, out=0 * biases, where=scales > 0)
    nearest = np.clip(np.round(offset), 0, largest)
    away = np.abs(offset - nearest)
    whole = bool((away <= np.clip(rounding * steps, OFF, MOVED)).all())
    return Groups(
        data,
        scales.astype(np.float32),
        (nearest if whole else offset).astype(np.float32),
        bits,
        whole,
        moved=whole and bool((away > OFF).any()),
    )


def _fill_flat(split: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> None:
    """Groups of one value, whose scale MLX makes next to nothing, get that value as their scale.

    A group of c: data 1, scale c, bias 0. c = 0: all zero.
    """
    for part in parts_of(split):
        data, scale, bias = split[part], scales[part], biases[part]
        flat = (data == data[..., :1]).all(-1)
        if flat.any():
            scale[flat] = scale[flat] * data[flat, 0] + bias[flat]
            data[flat], bias[flat] = 1, 0


def parts_of(array: np.ndarray) -> Iterator[slice]:
    """Slices of the first axis, each of so much that it stays in a processor's cache."""
    rows = max(1, CACHED // max(1, array[:1].size))
    return (slice(first, first + rows) for first in range(0, len(array), rows))


def rounded(weight: Dense | Groups | Palette, half: bool) -> Dense | Groups | Palette:
    """The same with every constant as a float16 package holds it. Raises UsageError beyond it."""
    if not half:
        return weight
    if isinstance(weight, Groups):
        offset = weight.offset if weight.whole else to_half(weight.offset)
        return replace(weight, scale=to_half(weight.scale), offset=offset)
    if isinstance(weight, Palette):
        return replace(weight, table=to_half(weight.table))
    return Dense(to_half(weight.weight).astype(np.float16))


def to_half(x: np.ndarray) -> np.ndarray:
    """float32 with float16's values. Raises UsageError where one is beyond them."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float16).astype(np.float32)
    if not np.isfinite(y).all():
        raise UsageError(
            f"decoder: a weight of {float(np.abs(x).max()):.3g} does not fit in float16: use "
            "--precision fp32"
        )
    return y


def matrix(layer: nn.Module, bits: Bits | None, half: bool) -> Matrix:
    """A linear layer or embedding of MLX, quantised or not, as it is exported.

    bits: what becomes of weights that MLX holds in full. Raises UsageError for a quantisation
    that Core ML has no form of.
    """
    bias = numpy(layer.bias) if "bias" in layer else None
    if bias is not None and half:
        bias = to_half(bias)
    return Matrix(rounded(_weight(layer, bits), half), bias)


def original(
    layer: nn.Module, bits: Bits | None, rows: slice | mx.array = slice(None)
) -> np.ndarray:
    """What MLX makes of a layer's weights, float32 [rows, in], `bits` as MLX quantises."""
    weight = layer.weight[rows]
    if "scales" in layer:
        parts, form = (layer.scales[rows], layer.biases[rows]), (layer.group_size, layer.bits)
    elif bits in WIDTHS:
        form = group_size(weight.shape[1]), bits
        weight, *parts = _compressed(weight, bits)
    else:
        return numpy(weight)
    scales, biases = (array.astype(mx.float32) for array in parts)
    return np.array(mx.dequantize(weight, scales, biases, group_size=form[0], bits=form[1]))


def _compressed(weight: mx.array, bits: int) -> Any:
    """Quantised by MLX from float32: in half precision its offsets would be integers no more."""
    wide = weight.astype(mx.float32)
    return mx.quantize(wide, group_size=group_size(weight.shape[1]), bits=bits)


def group_size(inputs: int) -> int:
    """The group size of weights that are quantised here. Raises UsageError where there is none."""
    for size in GROUPS:
        if inputs % size == 0:
            return size
    raise UsageError(
        f"decoder: a matrix of {inputs} inputs has no groups of 64 or 32: leave --bits out"
    )


def _weight(layer: nn.Module, bits: Bits | None) -> Dense | Groups | Palette:
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return _quantized(layer, bits)
    weight = layer.weight
    if bits is None:
        return Dense(numpy(weight))
    if isinstance(bits, str):
        return palette(numpy(weight), PALETTES[bits])
    return groups(*_arrays(_compressed(weight, bits)), bits)


def _quantized(layer: nn.Module, bits: Bits | None) -> Groups | Palette:
    if layer.mode != "affine" or layer.bits not in WIDTHS:
        raise UsageError(
            f"decoder: {layer.bits}-bit weights of mode {layer.mode} have no Core ML form: export "
            "the model in full precision, or in 4 or 8 bits"
        )
    if bits not in (None, layer.bits):
        raise UsageError(
            f"decoder: its weights have {layer.bits} bits already: leave --bits out, or export "
            "the model in full precision"
        )
    arrays = _arrays((layer.weight, layer.scales, layer.biases))
    return groups(*arrays, layer.bits, ROUNDING[layer.scales.dtype])


def _arrays(parts: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight, scales, biases = parts
    return np.array(weight), numpy(scales), numpy(biases)
