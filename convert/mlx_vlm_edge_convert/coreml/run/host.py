"""The decoder's host: token ids -> embeddings, masks, rotary turns, cache writes -> logits.

It drives a bundle's decoder through whatever executes the package's functions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mlx_vlm_edge.errors import UsageError

from ..emit.matrices import unpacked
from ..emit.transformer import HIDDEN
from ..names import (
    CACHES,
    COS,
    DECODE,
    EMBEDDINGS,
    MASK,
    PICK,
    POSITION,
    SIN,
    TOKEN,
    in_order,
    new_name,
)
from ..package.malformed import reading
from .prompt_cache import PromptCache
from .runner import Runner

EMBEDDINGS_FILE = "embeddings.safetensors"
EMBEDDINGS_NAME = "embeddings"
LARGEST = 1 << 24  # of any of a decoder's sizes


@dataclass(frozen=True)
class Geometry:
    """What the host must know; the manifest has it under the decoder.

    form: "stateful" or "readonly". chunk: positions of `prefill`, chunks: of each function that
    takes several, decode: the name of the one that takes one. periods float[head_dim / 2]:
    position / period is the angle of a pair.
    """

    form: str
    layers: int
    kv_heads: int
    head_dim: int
    context: int
    chunk: int
    chunks: Mapping[str, int]
    periods: Sequence[float]
    dtype: str
    decode: str = DECODE

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any], context: int | None = None) -> "Geometry":
        """Of a manifest's decoder entry, for the smallest of its contexts that has so many
        positions; the usual one without. Raises UsageError for what cannot be, or is not there."""
        with reading("manifest.json", "the decoder's geometry is wrong"):
            geometry = cls(**entry["geometry"])
            geometry._check()
            if context is None or "contexts" not in entry:
                return geometry
            keys = ("context", "chunks", "decode")
            every = [
                replace(geometry, **{key: each[key] for key in keys}) for each in entry["contexts"]
            ]
            for each in every:
                each._check()
        large = [each for each in every if each.context >= context]
        if not large:
            listed = " and ".join(f"{each.context:,}" for each in every)
            raise UsageError(f"the decoder has contexts of {listed}, none of {context:,}")
        return min(large, key=lambda each: each.context)

    def function(self, size: int) -> str:
        """The one that takes so many positions."""
        return next((name for name, n in self.chunks.items() if n == size), self.decode)

    @property
    def position_axis(self) -> int:
        """Of the cache's axes, the one of positions."""
        return 2 if self.form == "stateful" else 3

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Of keys, and of values."""
        stateful = self.form == "stateful"
        last = (self.context, self.head_dim) if stateful else (self.head_dim, self.context)
        return self.layers, self.kv_heads, *last

    def size(self, remaining: int, room: int) -> int:
        """Positions of the next pass over a prompt: the most of which more than half are used.

        room: positions that are left in the cache, beyond whose end padding must not reach.
        """
        sizes = sorted((size for size in self.chunks.values() if size <= room), reverse=True)
        if not sizes:
            return 1
        return next((size for size in sizes if remaining > size // 2), sizes[-1])

    def _check(self) -> None:
        """Raises ValueError or TypeError for what no package has."""
        sizes = (
            self.layers, self.kv_heads, self.head_dim, self.context, *self.chunks.values()
        )  # fmt: skip
        sound = (
            self.form in ("stateful", "readonly")
            and self.dtype in ("float16", "float32")
            and all(type(size) is int and 0 < size < LARGEST for size in sizes)
            and self.chunk == min(self.chunks.values())
            and max(self.chunks.values()) <= self.context
            and len({*self.chunks.values()}) == len(self.chunks)
            and all(type(name) is str for name in (*self.chunks, self.decode))
            and 2 * len(self.periods) == self.head_dim
            and all(math.isfinite(period) and period > 0 for period in self.periods)
        )
        if not sound:
            raise ValueError("sizes or words that no decoder has")


class DecoderHost:
    """Generates with a decoder package and its embeddings [V, D].

    token: the one that leads in the last logits, by the package; None where it does not say.
    prompt_cache: the bundle's, None where it has none.
    """

    def __init__(
        self,
        package: Runner,
        geometry: Geometry,
        embeddings: np.ndarray,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        self._package, self._geometry, self.embeddings = package, geometry, embeddings
        self.prompt_cache = prompt_cache
        self._dtype = np.dtype(geometry.dtype)
        self.start()

    @classmethod
    def open(
        cls, folder: Path, entry: Mapping[str, Any], package: Runner, context: int | None = None
    ) -> "DecoderHost":
        """Of a bundle's folder. entry: the manifest's, of the decoder that `package` runs. context:
        positions that are needed, where it is not the usual one."""
        with reading(folder, "the decoder's embeddings are damaged"):
            described = entry["embeddings"]
            file = folder / described["file"]
            if file.parent != folder:
                raise ValueError(f"{described['file']} is elsewhere")
            table = _table(load_file(file), described)
            if table.ndim != 2 or table.dtype.kind != "f":
                raise ValueError(f"{table.dtype} of {table.ndim} axes")
        geometry, known = Geometry.from_manifest(entry, context), entry.get("prompt_cache")
        if known is not None:
            known = PromptCache.read(folder, known, geometry.cache_shape, geometry.position_axis)
        return cls(package, geometry, table, known)

    def start(self) -> None:
        """Forget everything."""
        g = self._geometry
        self.offset = 0
        self._state: Any = None
        self._caches: dict[str, np.ndarray] = {}
        self.token: int | None = None
        if g.form == "stateful":
            self._state = self._package.new_state(g.decode)
            return
        self._caches = {name: np.zeros(g.cache_shape, self._dtype) for name in CACHES}

    def begin(self, ids: Sequence[int]) -> int:
        """Forget everything but the bundle's prompt cache: how many of a prompt's first ids need
        not be run, 0 where it begins otherwise. Some of the prompt must be left behind them."""
        self.start()
        known, axis = self.prompt_cache, self._geometry.position_axis
        count = 0 if known is None else min(known.shared(ids), self._geometry.context)
        if known is None or not count:
            return 0
        for name, array in known.arrays.items():
            first = np.take(array, range(count), axis)
            if self._state is not None:
                self._package.write(self._state, name, first)
            else:
                self._caches[name][..., :count] = first
        self.offset = count
        return count

    def cached(self) -> dict[str, np.ndarray]:
        """Keys and values of all positions so far, as they lie in the cache."""
        g = self._geometry
        whole = self._caches or {name: self._package.read(self._state, name) for name in CACHES}
        dtype = np.float16 if g.form == "stateful" else self._dtype  # as states are
        return {
            name: np.take(array, range(self.offset), g.position_axis).astype(dtype)
            for name, array in whole.items()
        }

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Token ids -> input embeddings [L, D]."""
        return self.embeddings[np.asarray(ids, np.int64)]

    def prefill(self, embeddings: np.ndarray) -> np.ndarray:
        """Run a prompt [L, D] after what is cached; logits float32 [tokens] of its last position.

        Raises UsageError when the context has no room for it.
        """
        g, length = self._geometry, len(embeddings)
        if self.offset + length > g.context:
            raise UsageError(
                f"the prompt takes {self.offset + length:,} positions, the package's context "
                f"has {g.context:,}: export with a larger --context"
            )
        logits, first = np.zeros(0, np.float32), 0
        while first < length:
            count = g.size(length - first, g.context - self.offset)
            part = embeddings[first : first + count]
            logits = self._run(part, count)
            first += len(part)
        return logits

    def step(self, token: int) -> np.ndarray:
        """Logits float32 [tokens] after one more. Raises UsageError when the context is full."""
        if self._full():
            raise UsageError(
                f"the package's context of {self._geometry.context:,} is full: export with a "
                "larger --context"
            )
        return self._run(self.embed([token]), 1)

    def _full(self) -> bool:
        return self.offset >= self._geometry.context

    def generate(
        self, embeddings: np.ndarray, max_tokens: int, stops: Sequence[int] = ()
    ) -> Iterator[int]:
        """Greedy token ids; a stop id is the last, and the context's end ends it too."""
        logits = self.prefill(embeddings)
        for index in range(max_tokens):
            token = int(logits.argmax())
            yield token
            if token in stops or index + 1 == max_tokens or self._full():
                return
            logits = self.step(token)

    def _run(self, embeddings: np.ndarray, size: int) -> np.ndarray:
        """Up to `size` positions through the function of that size."""
        g, count = self._geometry, len(embeddings)
        stateful = g.form == "stateful"
        rows = np.zeros((size, embeddings.shape[1]), self._dtype)
        rows[:count] = embeddings
        inputs = {
            # [1, q, D], or channels first [1, D, 1, q]
            EMBEDDINGS: rows[None] if stateful else rows.T[None, :, None],
            MASK: mask(self.offset, size, g.context, stateful).astype(self._dtype),
            **self._turns(size),
        }
        if size > 1:
            pick = np.zeros(size, self._dtype)
            pick[count - 1] = 1
            inputs[PICK] = pick.reshape((1, 1, -1) if stateful else (1, -1, 1))
        if stateful:
            inputs[POSITION] = np.array([self.offset], np.int32)
        outputs = self._package.run(g.function(size), {**inputs, **self._caches}, self._state)
        for name, cache in self._caches.items():
            cache[..., self.offset : self.offset + count] = outputs[new_name(name)][..., :count]
        self.offset += count
        self.token = int(np.ravel(outputs[TOKEN])[0]) if TOKEN in outputs else None
        return _joined(outputs)

    def _turns(self, size: int) -> dict[str, np.ndarray]:
        """Cosines and sines [1, 1, head_dim, size] of the next positions."""
        positions = np.arange(self.offset, self.offset + size)
        angles = positions[None] / np.asarray(self._geometry.periods, np.float64)[:, None]
        both = np.concatenate([angles, angles])[None, None]
        return {COS: np.cos(both).astype(self._dtype), SIN: np.sin(both).astype(self._dtype)}


def _table(arrays: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> np.ndarray:
    """Embeddings [V, D]: dense as they are, or of groups, scale * (value - offset)."""
    name, bits = described["name"], described.get("bits")
    if bits is None:
        return arrays[name]
    values = unpacked(arrays[name], bits).astype(np.float32)
    scale, offset = (arrays[f"{name}.{what}"].astype(np.float32) for what in ("scale", "offset"))
    split = values.reshape(*scale.shape, -1)
    dense = scale[..., None] * (split - offset[..., None])
    return dense.reshape(described["shape"]).astype(described["dtype"])  # groups to channels


def mask(offset: int, size: int, context: int, stateful: bool) -> np.ndarray:
    """What is added to scores, 0 where a position sees a key of the cache, else HIDDEN.

    Stateful [1, 1, size, context], the new positions in place; read-only [1, 1, 1, context], the
    cache before them. mask(1, 2, 3, True) sees [[1, 1, 0], [1, 1, 1]], mask(1, 2, 3, False)
    [[1, 0, 0]].
    """
    last = offset + np.arange(size)[:, None] if stateful else offset - 1
    seen = np.broadcast_to(np.arange(context)[None] <= last, (size if stateful else 1, context))
    return np.where(seen, 0.0, HIDDEN).astype(np.float32)[None, None]


def _joined(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """All logits float32 [tokens], of one output or of parts in their order."""
    parts = [outputs[name] for name in in_order([*outputs])]
    return np.concatenate([np.ravel(part).astype(np.float32) for part in parts])
