"""Llama and Qwen2 as MIL: input embeddings of q positions -> logits of one, and keys and values.

Two forms, the same arithmetic. "stateful", for the GPU: rows [1, q, D], fused attention, the cache
in two states [layers, kv_heads, positions, head_dim]. "readonly", for the Neural Engine: channels
first [1, D, 1, q], 1x1 convolutions, a cache that is two inputs [layers, kv_heads, head_dim,
positions], whose last axis is never narrow, new keys and values as outputs, the head in parts.
Rotary cosines and sines, masks, positions and embeddings come from the host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlx_vlm_edge.language.llama import TextConfig

from ..names import (
    CACHES,
    COS,
    EMBEDDINGS,
    KEYS,
    LOGITS,
    MAIN,
    MASK,
    PICK,
    POSITION,
    SIN,
    TOKEN,
    VALUES,
    logits_part,
    new_name,
)
from .matrices import Matrix
from .toolkit import tools

Form = Literal["stateful", "readonly"]
SHRINK = 1e-4  # so that a position of zeros is not divided by zero
HEAD = 16384  # outputs of a part of the head: the Neural Engine's limit of a width
HIDDEN = -1e4  # what a mask adds where nothing is to be seen; finite, as devices want it


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
    """What is emitted; every array holds values of the package's dtype.

    tokens: the vocabulary's first rows. The others, which round their number up, have no logits:
    none may be chosen.
    """

    config: TextConfig
    layers: Sequence[Layer]
    norm: np.ndarray
    head: Matrix
    tokens: int
    context: int
    half: bool
    form: Form

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Of all layers' keys, and of their values."""
        layers, heads, D = len(self.layers), self.config.num_key_value_heads, self.config.head_dim
        if self.form == "stateful":
            return layers, heads, self.context, D
        return layers, heads, D, self.context

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
            MASK: (1, 1, q if stateful else 1, self.context),
            COS: turns,
            SIN: turns,
        }
        if q > 1:
            shapes[PICK] = (1, 1, q) if stateful else (1, q, 1)
        if not stateful:
            shapes |= dict.fromkeys(CACHES, self.cache_shape)
        specs = {name: mb.TensorSpec(shape, self._dtype) for name, shape in shapes.items()}
        if stateful:
            specs[POSITION] = mb.TensorSpec((1,), types.int32)
            specs |= {name: mb.StateTensorSpec(self.cache_shape, types.fp16) for name in CACHES}
        return specs


class _Emission:
    """One program while it is built."""

    def __init__(self, decoder: Decoder, q: int, inputs: Mapping[str, Any]) -> None:
        self.decoder, self.config, self.q, self.inputs = decoder, decoder.config, q, inputs
        self.mb, self.stateful = tools().mb, decoder.form == "stateful"
        self.axis = -1 if self.stateful else 1  # of the channels
        self.number = np.float16 if decoder.half else np.float32
        self.new: dict[str, list[Any]] = {name: [] for name in CACHES}

    def run(self) -> list[Any]:
        """Logits and the token that leads, or logits and what the host must write in its cache."""
        mb, x = self.mb, self.inputs[EMBEDDINGS]
        self.cos, self.sin = self._turns()
        if self.stateful:
            self.caches = {name: mb.read_state(input=self.inputs[name]) for name in CACHES}
            group = self.config.num_attention_heads // self.config.num_key_value_heads
            # Query heads of one key head become rows of one matrix, which all have the mask's rows.
            self.mask = mb.tile(x=self.inputs[MASK], reps=[1, 1, group, 1])
        else:
            count = len(self.decoder.layers)
            self.past = {n: self._by_layer(self.inputs[n], count) for n in CACHES}
        for index, layer in enumerate(self.decoder.layers):
            attended = self._attention(self._norm(x, layer.norms[0]), layer, index)
            x = mb.add(x=x, y=attended, name=f"layer_{index}_attention")
            fed = self._mlp(self._norm(x, layer.norms[1]), layer)
            x = mb.add(x=x, y=fed, name=f"layer_{index}")
        return [*self._head(x), *self._new_caches()]

    def _turns(self) -> tuple[Any, Any]:
        """Cosines and sines as the heads lie: [1, 1, q, head_dim], or as they come."""
        given = self.inputs[COS], self.inputs[SIN]
        if not self.stateful:
            return given
        cos, sin = (self.mb.transpose(x=x, perm=[0, 1, 3, 2]) for x in given)
        return cos, sin

    def _by_layer(self, cache: Any, count: int) -> list[Any]:
        return list(self.mb.split(x=cache, num_splits=count, axis=0)) if count > 1 else [cache]

    def _new_caches(self) -> list[Any]:
        """[layers, kv_heads, head_dim, q] of keys and of values."""
        if self.stateful:
            return []
        return [
            self.mb.concat(values=fresh, axis=0, name=new_name(name))
            for name, fresh in self.new.items()
        ]

    def _head(self, x: Any) -> list[Any]:
        """Logits of the picked position, [1, 1, tokens] and their largest's index [1, 1], or parts
        [1, <= HEAD, 1, 1]. Weights stay whole: palettes are of so many rows each."""
        mb, head = self.mb, self.decoder.head
        if self.q > 1:
            x = self._picked(x)
        x = self._norm(x, self.decoder.norm)
        if self.stateful:
            logits = self._of_tokens(self._linear(x, head), -1, 0, LOGITS)
            return [logits, mb.reduce_argmax(x=logits, axis=-1, keep_dims=False, name=TOKEN)]
        logits = []
        for index, start in enumerate(range(0, self.decoder.tokens, HEAD)):
            part = self._linear(x, head.rows(start, min(start + HEAD, head.outputs)))
            logits.append(self._of_tokens(part, 1, start, logits_part(index)))
        return logits

    def _of_tokens(self, logits: Any, axis: int, start: int, name: str) -> Any:
        """Logits from the row `start` on, without the rows that are no tokens."""
        end, rows = [*logits.shape], self.decoder.tokens - start
        if rows >= end[axis]:
            return self.mb.identity(x=logits, name=name)
        end[axis] = rows
        return self.mb.slice_by_index(x=logits, begin=[0] * len(end), end=end, name=name)

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

    def _attention(self, x: Any, layer: Layer, index: int) -> Any:
        """What is added to the stream."""
        mb, config = self.mb, self.config
        heads, kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q, k, v = self._linears(x, layer.qkv, [heads * D, kv * D, kv * D])
        query, key = (self._turned(self._split(*each)) for each in ((q, heads), (k, kv)))
        value = self._split(v, kv)
        if self.stateful:
            mixed = self._fused(query, key, value, index)
        else:
            mixed = self._apart(query, key, value, index)
        mixed = mb.reshape(x=mixed, shape=[1, heads, self.q, D])  # rows to heads and queries
        return self._linear(self._joined(mixed, heads * D), layer.out)

    def _rows(self, query: Any) -> Any:
        """[1, heads, q, head_dim] -> [1, kv_heads, heads / kv_heads * q, head_dim]."""
        config = self.config
        kv = config.num_key_value_heads
        group = config.num_attention_heads // kv
        return self.mb.reshape(x=query, shape=[1, kv, group * self.q, config.head_dim])

    def _fused(self, query: Any, key: Any, value: Any, index: int) -> Any:
        """Over the whole cache, with the new positions in place."""
        keys, values = self._written(KEYS, key, index), self._written(VALUES, value, index)
        return self.mb.scaled_dot_product_attention(
            query=self._rows(query), key=keys, value=values, attn_mask=self.mask,
            name=f"layer_{index}_mix",
        )  # fmt: skip

    def _apart(self, query: Any, key: Any, value: Any, index: int) -> Any:
        """Over the cache and over the new positions, one softmax of both: no cache is copied."""
        mb, name = self.mb, f"layer_{index}"
        query = mb.mul(x=query, y=self.number(self.config.head_dim**-0.5))
        rows = self._rows(mb.transpose(x=query, perm=[0, 1, 3, 2]))
        keys, values = self.past[KEYS][index], self.past[VALUES][index]
        past = mb.add(x=mb.matmul(x=rows, y=keys), y=self.inputs[MASK], name=f"{name}_scores")
        new = mb.matmul(x=rows, y=key)
        if self.q > 1:
            new = mb.add(x=new, y=self._causal(), name=f"{name}_new_scores")
        largest = mb.maximum(x=self._largest(past), y=self._largest(new))
        past, new = (mb.exp(x=mb.sub(x=x, y=largest)) for x in (past, new))
        sums = [mb.reduce_sum(x=x, axes=[-1], keep_dims=True) for x in (past, new)]
        share = mb.inverse(x=mb.add(x=sums[0], y=sums[1]), epsilon=self.number(0))
        mixed = [
            mb.matmul(x=mb.mul(x=weights, y=share), y=across, transpose_y=True)
            for weights, across in ((past, values), (new, value))
        ]
        self.new[KEYS].append(key)
        self.new[VALUES].append(value)
        return mb.add(x=mixed[0], y=mixed[1], name=f"{name}_mix")

    def _largest(self, scores: Any) -> Any:
        return self.mb.reduce_max(x=scores, axes=[-1], keep_dims=True)

    def _causal(self) -> np.ndarray:
        """[1, 1, heads / kv_heads * q, q]: 0 where a new position sees another, else HIDDEN."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        hidden = np.where(np.tri(self.q, dtype=np.bool_), 0, HIDDEN).astype(self.number)
        return np.tile(hidden, (group, 1))[None, None]

    def _split(self, x: Any, heads: int) -> Any:
        """Channels -> [1, heads, q, head_dim], or [1, heads, head_dim, q]."""
        mb, D = self.mb, self.config.head_dim
        if not self.stateful:
            return mb.reshape(x=x, shape=[1, heads, D, self.q])
        return mb.transpose(x=mb.reshape(x=x, shape=[1, self.q, heads, D]), perm=[0, 2, 1, 3])

    def _joined(self, x: Any, width: int) -> Any:
        """[1, heads, q, head_dim] -> channels."""
        mb = self.mb
        if self.stateful:
            moved = mb.transpose(x=x, perm=[0, 2, 1, 3])
            return mb.reshape(x=moved, shape=[1, self.q, width])
        return mb.reshape(x=mb.transpose(x=x, perm=[0, 1, 3, 2]), shape=[1, width, 1, self.q])

    def _turned(self, x: Any) -> Any:
        """Rotary positions, rotate-half: x cos + [-second half, first half] sin."""
        mb, axis = self.mb, 3 if self.stateful else 2
        first, second = mb.split(x=x, num_splits=2, axis=axis)
        rotated = mb.concat(values=[mb.mul(x=second, y=self.number(-1)), first], axis=axis)
        return mb.add(x=mb.mul(x=x, y=self.cos), y=mb.mul(x=rotated, y=self.sin))

    def _written(self, name: str, fresh: Any, layer: int) -> Any:
        """A layer's keys or values [1, kv_heads, positions, head_dim], with the q new ones at
        `position`; states are float16 in every program."""
        mb, half = self.mb, self.decoder.half
        start, (_, kv, _, D) = self.inputs[POSITION], self.decoder.cache_shape
        stop = mb.add(x=start, y=np.array([self.q], np.int32))
        narrow = fresh if half else mb.cast(x=fresh, dtype="fp16")
        new = mb.slice_update(
            x=self.caches[name], update=narrow, begin=self._place(layer, 0, start, 0),
            end=self._place(layer + 1, kv, stop, D),
        )  # fmt: skip
        whole = mb.coreml_update_state(state=self.inputs[name], value=new)
        self.caches[name] = whole
        own = mb.slice_by_index(
            x=whole, begin=[layer, 0, 0, 0], end=[layer + 1, kv, self.decoder.context, D]
        )
        return own if half else mb.cast(x=own, dtype="fp32")

    def _place(self, layer: int, head: int, position: Any, channel: int) -> Any:
        """A corner of a slice of a state."""
        before, after = np.array([layer, head], np.int32), np.array([channel], np.int32)
        return self.mb.concat(values=[before, position, after], axis=0)
