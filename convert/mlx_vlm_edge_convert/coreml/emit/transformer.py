"""Llama and Qwen2 as MIL: input embeddings of q positions -> logits of one, and keys and values.

Two forms, the same arithmetic. "stateful": rows [1, q, D], the cache in Core ML's states, for the
GPU. "readonly": channels first [1, D, 1, q], 1x1 convolutions, a cache that is an input, new keys
and values as outputs, the head in parts, for the Neural Engine. Keys and values are
[1, kv_heads, head_dim, positions] in both, so that the last axis is never narrow. Rotary cosines
and sines, masks and positions come from the host; so do embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlx_vlm_edge.language.llama import TextConfig

from ..names import (
    COS,
    EMBEDDINGS,
    LOGITS,
    MAIN,
    MASK,
    PICK,
    POSITION,
    SIN,
    cache_names,
    logits_part,
    new_name,
)
from .matrices import Matrix
from .toolkit import tools

Form = Literal["stateful", "readonly"]
SHRINK = 1e-4  # so that a position of zeros is not divided by zero
HEAD = 16384  # outputs of a part of the head: the Neural Engine's limit of a width


@dataclass(frozen=True)
class Layer:
    """One block: qkv and gate_up are one matrix each, or one for each of their outputs."""

    qkv: Sequence[Matrix]
    out: Matrix
    gate_up: Sequence[Matrix]
    down: Matrix
    norms: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Decoder:
    """What is emitted; every array holds values of the package's dtype."""

    config: TextConfig
    layers: Sequence[Layer]
    norm: np.ndarray
    head: Matrix
    context: int
    half: bool
    form: Form

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Of a layer's keys, and of its values."""
        return 1, self.config.num_key_value_heads, self.config.head_dim, self.context

    @property
    def _dtype(self) -> Any:
        return tools().types.fp16 if self.half else tools().types.fp32

    def program(self, q: int) -> Any:
        """The MIL program for q positions at a time."""
        mil, target = tools().ct.converters.mil.mil, tools().ct.target.iOS18
        program = mil.Program()
        with mil.Function(self._specs(q), target) as function:
            function.set_outputs(_Emission(self, q, function.inputs).run())
            program.add_function(MAIN, function)
        return program

    def _specs(self, q: int) -> dict[str, Any]:
        mb, types, config = tools().mb, tools().types, self.config
        width, stateful = config.hidden_size, self.form == "stateful"
        turns = (1, 1, config.head_dim, q)
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDINGS: (1, q, width) if stateful else (1, width, 1, q),
            MASK: (1, 1, q, self.context + (0 if stateful else q)),
            COS: turns,
            SIN: turns,
        }
        if q > 1:
            shapes[PICK] = (1, 1, q) if stateful else (1, q, 1)
        caches = [name for index in range(len(self.layers)) for name in cache_names(index)]
        if not stateful:
            shapes |= dict.fromkeys(caches, self.cache_shape)
        specs = {name: mb.TensorSpec(shape, self._dtype) for name, shape in shapes.items()}
        if stateful:
            specs[POSITION] = mb.TensorSpec((1,), types.int32)
            specs |= {name: mb.StateTensorSpec(self.cache_shape, types.fp16) for name in caches}
        return specs


class _Emission:
    """One program while it is built."""

    def __init__(self, decoder: Decoder, q: int, inputs: Mapping[str, Any]) -> None:
        self.decoder, self.config, self.q, self.inputs = decoder, decoder.config, q, inputs
        self.mb, self.stateful = tools().mb, decoder.form == "stateful"
        self.axis = -1 if self.stateful else 1  # of the channels
        self.number = np.float16 if decoder.half else np.float32

    def run(self) -> list[Any]:
        """Logits, then new keys and values where the host keeps them."""
        x, new = self.inputs[EMBEDDINGS], []
        for index, layer in enumerate(self.decoder.layers):
            attended, written = self._attention(self._norm(x, layer.norms[0]), layer, index)
            x = self.mb.add(x=x, y=attended, name=f"layer_{index}_attention")
            fed = self._mlp(self._norm(x, layer.norms[1]), layer)
            x = self.mb.add(x=x, y=fed, name=f"layer_{index}")
            new += written
        return [*self._head(x), *new]

    def _head(self, x: Any) -> list[Any]:
        """Logits of the picked position, [1, 1, V] or parts [1, <= HEAD, 1, 1]."""
        mb, head = self.mb, self.decoder.head
        if self.q > 1:
            x = self._picked(x)
        x = self._norm(x, self.decoder.norm)
        if self.stateful:
            return [mb.identity(x=self._linear(x, head), name=LOGITS)]
        starts = range(0, head.outputs, HEAD)
        parts = [head.rows(start, min(start + HEAD, head.outputs)) for start in starts]
        return [
            mb.identity(x=self._linear(x, part), name=logits_part(index))
            for index, part in enumerate(parts)
        ]

    def _picked(self, x: Any) -> Any:
        """The position where `pick` is one: a product with ones and zeros, exact, no gather."""
        mb, width = self.mb, self.config.hidden_size
        if self.stateful:
            return mb.matmul(x=self.inputs[PICK], y=x)
        rows = mb.squeeze(x=x, axes=[2])  # [1, D, q]
        one = mb.matmul(x=rows, y=self.inputs[PICK])
        return mb.reshape(x=one, shape=[1, width, 1, 1])

    def _linear(self, x: Any, matrix: Matrix) -> Any:
        half, bias = self.decoder.half, matrix.bias
        shared = {} if bias is None else {"bias": bias.astype(self.number)}
        if self.stateful:
            return self.mb.linear(x=x, weight=matrix.weight.emit(half, ()), **shared)
        return self.mb.conv(x=x, weight=matrix.weight.emit(half, (1, 1)), **shared)

    def _linears(self, x: Any, matrices: Sequence[Matrix], sizes: Sequence[int]) -> list[Any]:
        """What several matrices give, or one that gives it side by side."""
        if len(matrices) == len(sizes):
            return [self._linear(x, matrix) for matrix in matrices]
        whole = self._linear(x, matrices[0])
        return list(self.mb.split(x=whole, split_sizes=list(sizes), axis=self.axis))

    def _norm(self, x: Any, weight: np.ndarray) -> Any:
        """RMSNorm. In float16 of x over its largest, whose square cannot overflow.

        x / sqrt(mean(x^2) + eps) = r x / sqrt(mean((r x)^2) + r^2 eps), with r near 1 / max |x|.
        """
        mb, number, axes = self.mb, self.number, [self.axis]
        eps: Any = number(self.config.rms_norm_eps)
        if self.decoder.half:
            largest = mb.reduce_max(x=mb.abs(x=x), axes=axes, keep_dims=True)
            shrink = mb.inverse(x=largest, epsilon=number(SHRINK))
            x = mb.mul(x=x, y=shrink)
            # 1e-6 is beneath float16's normal numbers, its root is not.
            root = mb.mul(x=shrink, y=number(self.config.rms_norm_eps**0.5))
            eps = mb.mul(x=root, y=root)
        mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=axes, keep_dims=True)
        normed = mb.mul(x=x, y=mb.rsqrt(x=mb.add(x=mean, y=eps), epsilon=number(0)))
        shape = (1, 1, -1) if self.stateful else (1, -1, 1, 1)
        return mb.mul(x=normed, y=weight.astype(number).reshape(shape))

    def _mlp(self, x: Any, layer: Layer) -> Any:
        mb, inner = self.mb, self.config.intermediate_size
        gate, up = self._linears(x, layer.gate_up, [inner, inner])
        # In this order, since coremltools joins gate * sigmoid(gate) to one operation.
        weighed = mb.mul(x=up, y=mb.sigmoid(x=gate))
        return self._linear(mb.mul(x=weighed, y=gate), layer.down)

    def _attention(self, x: Any, layer: Layer, index: int) -> tuple[Any, list[Any]]:
        """What is added to the stream, and the new keys and values where the host keeps them."""
        mb, config = self.mb, self.config
        heads, kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q, k, v = self._linears(x, layer.qkv, [heads * D, kv * D, kv * D])
        query = self._turned(self._split(q, heads))
        query = mb.mul(x=query, y=self.number(D**-0.5))
        key, value = self._turned(self._split(k, kv)), self._split(v, kv)
        keys, values, new = self._cached(index, key, value)
        group, total = heads // kv * self.q, keys.shape[-1]
        rows = mb.transpose(x=query, perm=[0, 1, 3, 2])  # [1, heads, q, D]
        # Query heads of one key head become rows of one matrix: [1, kv, heads / kv * q, D].
        rows = mb.reshape(x=rows, shape=[1, kv, group, D])
        scores = mb.matmul(x=rows, y=keys)
        # Apart again, so that the mask [1, 1, q, positions] spreads over the heads.
        scores = mb.reshape(x=scores, shape=[kv, heads // kv, self.q, total])
        scores = mb.add(x=scores, y=self.inputs[MASK], name=f"layer_{index}_scores")
        weights = mb.reshape(x=mb.softmax(x=scores, axis=-1), shape=[1, kv, group, total])
        mixed = mb.matmul(x=weights, y=values, transpose_y=True)
        mixed = mb.reshape(x=mixed, shape=[1, heads, self.q, D])  # rows to heads and queries
        return self._linear(self._joined(mixed, heads * D), layer.out), new

    def _split(self, x: Any, heads: int) -> Any:
        """Channels -> [1, heads, head_dim, q]."""
        mb, D = self.mb, self.config.head_dim
        if not self.stateful:
            return mb.reshape(x=x, shape=[1, heads, D, self.q])
        return mb.transpose(x=mb.reshape(x=x, shape=[1, self.q, heads, D]), perm=[0, 2, 3, 1])

    def _joined(self, x: Any, width: int) -> Any:
        """[1, heads, q, head_dim] -> channels."""
        mb = self.mb
        if self.stateful:
            moved = mb.transpose(x=x, perm=[0, 2, 1, 3])
            return mb.reshape(x=moved, shape=[1, self.q, width])
        return mb.reshape(x=mb.transpose(x=x, perm=[0, 1, 3, 2]), shape=[1, width, 1, self.q])

    def _turned(self, x: Any) -> Any:
        """Rotary positions, rotate-half: x cos + [-second half, first half] sin."""
        mb = self.mb
        first, second = mb.split(x=x, num_splits=2, axis=2)
        rotated = mb.concat(values=[mb.mul(x=second, y=self.number(-1)), first], axis=2)
        turned = mb.mul(x=rotated, y=self.inputs[SIN])
        return mb.add(x=mb.mul(x=x, y=self.inputs[COS]), y=turned)

    def _cached(self, index: int, key: Any, value: Any) -> tuple[Any, Any, list[Any]]:
        """Keys and values [1, kv_heads, head_dim, all positions], and what the host must write."""
        mb, whole, new = self.mb, [], []
        for name, fresh in zip(cache_names(index), (key, value), strict=True):
            if self.stateful:
                whole.append(self._written(self.inputs[name], fresh))
                continue
            whole.append(mb.concat(values=[self.inputs[name], fresh], axis=3))  # past, then new
            new.append(mb.identity(x=fresh, name=new_name(name)))
        return whole[0], whole[1], new

    def _written(self, state: Any, fresh: Any) -> Any:
        """A state with q positions written at `position`; states are float16 in every program."""
        mb, half = self.mb, self.decoder.half
        start, (_, kv, D, _) = self.inputs[POSITION], self.decoder.cache_shape
        stop = mb.add(x=start, y=np.array([self.q], np.int32))
        zeros, sizes = np.zeros(3, np.int32), np.array([1, kv, D], np.int32)
        narrow = fresh if half else mb.cast(x=fresh, dtype="fp16")
        new = mb.slice_update(
            x=mb.read_state(input=state), update=narrow,
            begin=mb.concat(values=[zeros, start], axis=0),
            end=mb.concat(values=[sizes, stop], axis=0),
        )  # fmt: skip
        whole = mb.coreml_update_state(state=state, value=new)
        return whole if half else mb.cast(x=whole, dtype="fp32")
