"""KV caches with mlx-lm's protocol, class names and state, so that saved caches interchange.

`update_and_fetch(keys, values)` takes [B, kv_heads, L, head_dim] and gives all keys and values so
far; `offset` counts every position seen; `trim(n)` forgets the last n.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..errors import UsageError

Mask = mx.array | str | None
STEP = 256  # positions a cache grows by
KV_GROUP_SIZE = 64  # by default, where keys and values are quantised
QUANTIZED_KV_START = 5000  # positions from which on they are


class Cache(Protocol):
    @property
    def offset(self) -> Any: ...  # positions so far: an int, or int[B] of several sequences

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]: ...
    def make_mask(self, N: int) -> Mask: ...
    def is_trimmable(self) -> bool: ...
    def trim(self, n: int) -> int: ...
    @property
    def state(self) -> Any: ...


def causal_mask(N: int, offset: int, window: int) -> mx.array:
    """bool [N, offset + N]: query i (at offset + i) sees key j when 0 <= offset + i - j < window.

    causal_mask(2, 1, 2) -> [[1, 1, 0], [0, 1, 1]]
    """
    distance = mx.arange(offset, offset + N)[:, None] - mx.arange(offset + N)[None]
    return (distance >= 0) & (distance < window)


def _grow(buffer: mx.array | None, like: mx.array, used: int) -> mx.array:
    """A buffer with room for `like` after its first `used` positions."""
    B, heads, L, D = like.shape
    room = mx.zeros((B, heads, -(-L // STEP) * STEP, D), like.dtype)
    return room if buffer is None else mx.concatenate([buffer[..., :used, :], room], axis=2)


class _Growing:
    """What caches that keep every position have in common."""

    offset = 0

    def make_mask(self, N: int) -> Mask:
        return "causal" if N > 1 else None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        n = min(self.offset, n)
        self.offset -= n
        return n


class KVCache(_Growing):
    """Keeps every position."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start, self.offset = self.offset, self.offset + keys.shape[2]
        if self.keys is None or self.values is None or self.offset > self.keys.shape[2]:
            self.keys = _grow(self.keys, keys, start)
            self.values = _grow(self.values, values, start)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "QuantizedKVCache":
        quantized = QuantizedKVCache(group_size, bits)
        if self.keys is not None and self.values is not None:
            used = slice(0, self.offset)
            quantized.update_and_fetch(self.keys[..., used, :], self.values[..., used, :])
        return quantized

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, state: tuple[mx.array | None, mx.array | None, int]) -> None:
        self.keys, self.values, self.offset = state


class QuantizedKVCache(_Growing):
    """Keeps every position in 2 to 8 bits: each of keys and values is (packed, scales, biases)."""

    def __init__(self, group_size: int = 64, bits: int = 8) -> None:
        self.keys: list[mx.array] | None = None
        self.values: list[mx.array] | None = None
        self.offset = 0
        self.group_size = group_size
        self.bits = bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        if keys.shape[-1] % self.group_size or values.shape[-1] % self.group_size:
            raise UsageError(
                f"a head of {keys.shape[-1]} values cannot be cached in groups of "
                f"{self.group_size}: leave --kv-bits out, or set --kv-group-size to 32 if that fits"
            )
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._stored(self.keys, keys, start)
        self.values = self._stored(self.values, values, start)
        return self._used(self.keys), self._used(self.values)

    def _stored(self, buffers: list[mx.array] | None, new: mx.array, start: int) -> list[mx.array]:
        parts = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        if buffers is None:
            buffers = [_grow(None, part, 0) for part in parts]
        elif self.offset > buffers[0].shape[2]:
            buffers = [_grow(*pair, start) for pair in zip(buffers, parts, strict=True)]
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[..., start : self.offset, :] = part
        return buffers

    def _used(self, buffers: list[mx.array]) -> list[mx.array]:
        return [buffer[..., : self.offset, :] for buffer in buffers]

    @property
    def state(self) -> tuple[Any, Any, int, int, int]:
        return self.keys, self.values, self.offset, self.group_size, self.bits

    @state.setter
    def state(self, state: tuple[Any, Any, int, int, int]) -> None:
        self.keys, self.values, self.offset, self.group_size, self.bits = state


class QuantizingCaches(list[Cache]):
    """One cache per layer; plain ones become quantised ones, in place, once they hold `start`
    positions. As in mlx-lm that happens after a pass, so what a pass adds is whole in it."""

    def __init__(self, caches: Iterable[Cache], bits: int, group_size: int, start: int) -> None:
        super().__init__(caches)
        self.bits, self.group_size, self.start = bits, group_size, start

    def quantize(self) -> None:
        for index, layer in enumerate(self):
            if isinstance(layer, KVCache) and layer.offset >= self.start:
                self[index] = layer.to_quantized(self.group_size, self.bits)


def settle(caches: Sequence[Cache]) -> None:
    """Between the parts of a long prompt: compute keys and values, quantised where that is due."""
    if isinstance(caches, QuantizingCaches):
        caches.quantize()
    mx.eval([layer.state for layer in caches])


class RotatingKVCache:
    """Keeps the first `keep` positions and the last `max_size - keep` others.

    `keep` must cover the prompt's visual tokens, which must not be evicted.
    """

    def __init__(self, max_size: int, keep: int = 0) -> None:
        if not 0 <= keep < max_size:
            raise UsageError(
                f"--max-kv-size {max_size}: {keep} positions are to be kept; give more room"
            )
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.keep = keep
        self.max_size = max_size
        self._idx = 0  # where the next position goes

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if keys.shape[2] == 1:
            return self._put_one(keys, values)
        return self._append(keys, values)

    def _append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Several positions: put in order of time, evict what even the first of them cannot see."""
        if self.keys is not None and self.values is not None:
            self.keys = self._appended(self.keys, keys)
            self.values = self._appended(self.values, values)
        else:
            self.keys, self.values = keys, values
        self.offset += keys.shape[2]
        self._idx = self.keys.shape[2]
        return self.keys, self.values

    def _appended(self, buffer: mx.array, new: mx.array) -> mx.array:
        ordered = self._in_order(buffer)
        evicted = max(0, ordered.shape[2] - self.max_size + 1)
        kept = [ordered[..., : self.keep, :], ordered[..., self.keep + evicted :, :]]
        return mx.concatenate([*(kept if evicted else [ordered]), new], axis=2)

    def _in_order(self, buffer: mx.array) -> mx.array:
        if self._idx == buffer.shape[2]:
            return buffer
        if self._idx >= self.offset:  # not wrapped yet: the rest is unused room
            return buffer[..., : self._idx, :]
        parts = (slice(0, self.keep), slice(self._idx, None), slice(self.keep, self._idx))
        return mx.concatenate([buffer[..., part, :] for part in parts], axis=2)

    def _put_one(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = self._with_room(self.keys, keys)
        self.values = self._with_room(self.values, values)
        if self.keys.shape[2] == self.max_size and self._idx >= self.max_size:
            self._idx = self.keep
        self.keys[..., self._idx : self._idx + 1, :] = keys
        self.values[..., self._idx : self._idx + 1, :] = values
        self.offset += 1
        self._idx += 1
        used = min(self.offset, self.keys.shape[2])
        return self.keys[..., :used, :], self.values[..., :used, :]

    def _with_room(self, buffer: mx.array | None, like: mx.array) -> mx.array:
        B, heads, _, D = like.shape
        if buffer is None:
            return mx.zeros((B, heads, min(STEP, self.max_size), D), like.dtype)
        size = buffer.shape[2]
        if size > self.max_size:  # left so by a prompt of several positions
            self._idx = self.max_size
            recent = buffer[..., self.keep + size - self.max_size :, :]
            return mx.concatenate([buffer[..., : self.keep, :], recent], axis=2)
        if self._idx < size or size == self.max_size:
            return buffer
        room = mx.zeros((B, heads, min(STEP, self.max_size - size), D), like.dtype)
        return mx.concatenate([buffer, room], axis=2)

    def make_mask(self, N: int) -> Mask:
        if N == 1:
            return None
        before = min(self.max_size - 1, self.offset)
        if before + N <= self.max_size:
            return "causal"
        mask = causal_mask(N, before, self.max_size)
        if self.keep:  # the kept positions stay visible, however far back
            mask = mask | (mx.arange(before + N) < self.keep)[None] & causal_mask(
                N, before, before + N
            )
        return mask

    def is_trimmable(self) -> bool:
        return self.offset < self.max_size

    def trim(self, n: int) -> int:
        n = min(self.offset, n)
        self.offset -= n
        self._idx -= n
        return n

    @property
    def state(self) -> tuple[Any, ...]:
        return self.keys, self.values, self.offset, self.keep, self.max_size, self._idx

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        self.keys, self.values, self.offset, self.keep, self.max_size, self._idx = state
