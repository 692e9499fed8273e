"""Earlier prompts' KV caches and image features -> what of a new prompt need not be computed.

Each position of a prompt has a key: its token id or, for a visual token, its image's digest and its
place in it. A prompt takes over the keys and values of the longest beginning that it shares with
an earlier one, answer included, and goes through the model from there on.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np

from ..language.cache import (
    Cache,
    KVCache,
    QuantizedKVCache,
    QuantizingCaches,
    RotatingKVCache,
)
from ..models.base import VisionLanguageModel
from ..picture.image import Pixels
from ..text.prompt import Inputs, Processor
from ..timings import Steps
from .disk import DiskStore

MAX_BYTES = 512 * 2**20
Layers = Sequence[tuple[mx.array, ...]]  # keys and values; three arrays of each, where packed
Packing = tuple[int, int, int]  # of quantised ones: group size, bits, positions from which on


def digest(pixels: Pixels, settings: str) -> bytes:
    """16 bytes that stand for an image as a model sees it: all fields of its pixels, and settings
    (the model's configuration) that decide what is made of them."""
    whole = blake2b(settings.encode(), digest_size=16)
    for part in fields(pixels):
        value = getattr(pixels, part.name)
        if isinstance(value, np.ndarray | mx.array):
            value = np.asarray(value)
            whole.update(f"|{part.name} {value.dtype} {value.shape}|".encode())
            whole.update(np.ascontiguousarray(value).data)
        else:
            whole.update(f"|{part.name} {value!r}|".encode())
    return whole.digest()


def position_keys(inputs: Inputs, digests: Sequence[bytes], counts: Sequence[int]) -> np.ndarray:
    """int64 [L, 3]: (token id, 0, 0), or (index in its image, the two halves of its digest).

    counts: visual tokens of each image. Ids 7 8 8 9 with an image of 2 tokens at 1 and 2 ->
    (7, 0, 0), (0, a, b), (1, a, b), (9, 0, 0).
    """
    keys = np.zeros((inputs.input_ids.shape[1], 3), np.int64)
    keys[:, 0] = inputs.input_ids[0]
    start = 0
    for name, count in zip(digests, counts, strict=True):
        places = inputs.visual[start : start + count]
        keys[places, 0] = np.arange(count)
        keys[places, 1:] = np.frombuffer(name, np.int64)
        start += count
    return keys


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many positions two prompts have in common at their beginning."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).any(axis=1)
    return int(differ.argmax()) if differ.any() else length


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A prompt and its answer: every position's key, and keys and values [1, heads, >= L, D]."""

    model: Callable[[], VisionLanguageModel | None]
    keys: np.ndarray
    layers: Layers
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer)


@dataclass(frozen=True, eq=False)
class _Image:
    """An image's visual tokens [N, D]."""

    model: Callable[[], VisionLanguageModel | None]
    tokens: mx.array

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes


class PrefixCache:
    """What earlier calls of `stream_generate` computed, up to `max_bytes`, least recently used out.

    For any number of models and threads. What is kept is never changed: a prompt that takes it over
    writes into copies. Models that are gone take what was kept for them along.

    Of a KV cache that was quantised, what is kept is quantised as well, in memory alone, and for
    prompts that ask for the same bits from the same position on, and share as much as that.

    disk: a folder, or a DiskStore, that remembers as well, for other processes and later ones; for
    models that were loaded from files.
    """

    def __init__(
        self, max_bytes: int = MAX_BYTES, disk: "DiskStore | str | Path | None" = None
    ) -> None:
        self.max_bytes = max_bytes
        self.disk = DiskStore(disk) if isinstance(disk, str | Path) else disk
        self._entries: OrderedDict[Any, _Prompt | _Image] = OrderedDict()
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return self._size()

    def clear(self) -> None:
        """Forget everything, as after a change of a model's weights."""
        with self._lock:
            self._entries.clear()

    def begin(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        inputs: Inputs,
        cache: list[Cache],
    ) -> "Run":
        """Fill `cache` (empty until now) with what is known of the prompt; see `Run`."""
        settings = repr(model.config)
        digests = [digest(pixels, settings) for pixels in inputs.pixels]
        counts = [processor.visual_tokens(pixels) for pixels in inputs.pixels]
        keys = position_keys(inputs, digests, counts)
        self._recall(model, keys, _packing(cache))
        start = self.take(model, keys, cache)
        self._touch((id(model.eyes), name) for name in digests)
        return Run(self, model, keys, cache, start, inputs, digests, counts)

    def _recall(
        self, model: VisionLanguageModel, keys: np.ndarray, packing: Packing | None
    ) -> None:
        """Take a prompt from the disk into memory where it knows a longer beginning."""
        if self.disk is None or model.identity is None:
            return
        known = self.known(model, keys, packing)
        stored = [(shared(other, keys), path) for path, other in self.disk.prompts(model.identity)]
        for length, path in sorted(stored, key=lambda pair: pair[0], reverse=True):
            if length <= known:
                return
            layers = self.disk.layers(path)
            if layers is not None:  # not damaged, nor gone
                self._add(object(), _Prompt(weakref.ref(model), keys[:length], layers))
                return

    def known(
        self, model: VisionLanguageModel, keys: np.ndarray, packing: Packing | None = None
    ) -> int:
        """How many positions of a prompt memory knows."""
        with self._lock:
            entries = self._prompts(model, keys, packing)
            return max((length for _, _, length in entries), default=0)

    def take(self, model: VisionLanguageModel, keys: np.ndarray, cache: list[Cache]) -> int:
        """Put the longest known beginning into `cache`; the last position is always left."""
        if not model.language_model.splits(len(keys)) or not all(
            _fits(layer, len(keys)) for layer in cache
        ):
            return 0
        length, longest = 0, None
        with self._lock:
            for name, entry, common in self._prompts(model, keys, _packing(cache)):
                known = min(common, len(keys) - 1)
                if 0 < known >= length:  # of equals the latest
                    length, longest, longest_name = known, entry, name
            if longest is not None:
                self._entries.move_to_end(longest_name)
        if longest is not None:
            for index, arrays in enumerate(longest.layers):
                if longest.packing is not None:
                    cache[index] = QuantizedKVCache(*longest.packing[:2])
                _fill(cache[index], arrays, length)
        return length

    def _prompts(
        self, model: VisionLanguageModel, keys: np.ndarray, packing: Packing | None
    ) -> list[tuple[Any, _Prompt, int]]:
        """Those of a model that a prompt with caches of such a packing, None for plain ones, may
        begin with, and how many positions they share.

        Quantised ones only where the caches would be quantised by then: what was asked before
        decides nothing about an answer.
        """
        found = []
        for name, entry in self._entries.items():
            if isinstance(entry, _Prompt) and entry.model() is model:
                length = shared(entry.keys, keys)
                taken = min(length, len(keys) - 1)
                if entry.packing is None or (entry.packing == packing and taken >= packing[2]):
                    found.append((name, entry, length))
        return found

    def _touch(self, names: Iterable[Any]) -> None:
        """Count images as used, so that they stay as long as the prompts they are in."""
        with self._lock:
            for name in names:
                if name in self._entries:
                    self._entries.move_to_end(name)

    def image(self, model: VisionLanguageModel, name: bytes) -> mx.array | None:
        """The visual tokens of an image by its digest, None where they are not known."""
        model = model.eyes
        with self._lock:
            entry = self._entries.get((id(model), name))
        if isinstance(entry, _Image) and entry.model() is model:  # not another at its address
            return entry.tokens
        if self.disk is None or model.identity is None:
            return None
        tokens = self.disk.image(model.identity, name)
        if tokens is not None:
            self._add((id(model), name), _Image(weakref.ref(model), tokens))
        return tokens

    def keep_image(self, model: VisionLanguageModel, name: bytes, tokens: mx.array) -> None:
        """Remember an image's visual tokens, in memory."""
        model = model.eyes
        mx.eval(tokens)  # what is not computed yet is of use to this thread alone
        self._add((id(model), name), _Image(weakref.ref(model), tokens))

    def write_image(self, model: VisionLanguageModel, name: bytes, tokens: mx.array) -> None:
        """Remember them on the disk, where there is one; waits for it."""
        if self.disk is not None and model.eyes.identity is not None:
            self.disk.keep_image(model.eyes.identity, name, tokens)

    def keep(
        self,
        model: VisionLanguageModel,
        keys: np.ndarray,
        layers: Layers,
        packing: Packing | None = None,
    ) -> None:
        """Remember a prompt's keys and values; what it continues, and can stand for, is dropped."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                if isinstance(entry, _Prompt) and entry.model() is model:
                    length = shared(entry.keys, keys)
                    if length == len(keys) and entry.packing in (None, packing):  # known already
                        self._entries.move_to_end(key)
                        return
                    if length == len(entry.keys) and packing in (None, entry.packing):
                        del self._entries[key]
        self._add(object(), _Prompt(weakref.ref(model), keys, layers, packing))
        if self.disk is not None and model.identity is not None and packing is None:
            self.disk.keep_prompt(model.identity, keys, layers)

    def _add(self, name: Any, item: _Prompt | _Image) -> None:
        with self._lock:
            self._entries[name] = item
            self._entries.move_to_end(name)
            for key, entry in list(self._entries.items()):
                if entry.model() is None:
                    del self._entries[key]
            while self._size() > self.max_bytes:
                self._entries.popitem(last=False)

    def _size(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())


@dataclass(frozen=True, eq=False)
class Run:
    """One prompt on its way through the model.

    start: positions that were known. digests and counts: of the prompt's images, what stands for
    each and how many visual tokens it has. encoded: those of images that were not known, which are
    remembered later: before the first token nothing waits for the device or the disk.
    """

    store: PrefixCache
    model: VisionLanguageModel
    keys: np.ndarray
    cache: list[Cache]
    start: int
    inputs: Inputs
    digests: list[bytes]
    counts: list[int]
    encoded: dict[bytes, mx.array] = field(default_factory=dict)

    @property
    def reused(self) -> int:
        """Positions that an earlier prompt had computed: all that were known."""
        return self.start

    def encode(self) -> Steps[Inputs]:
        """The prompt from `start` on with its visual tokens; known images are not encoded."""
        inputs, ends = self.inputs, np.cumsum(self.counts)
        places = np.split(inputs.visual, ends[:-1]) if len(ends) else []
        images = [
            (name, pixels, where)
            for name, pixels, where in zip(self.digests, inputs.pixels, places, strict=True)
            if len(where) and where[-1] >= self.start
        ]
        known = {name: self.store.image(self.model, name) for name, _, _ in images}
        tokens = {name: image for name, image in known.items() if image is not None}
        missing = {name: pixels for name, pixels, _ in images if name not in tokens}
        encoded = yield from self.model.encode(list(missing.values()))
        self.encoded.update(zip(missing, encoded, strict=True))
        tokens |= self.encoded
        rest = [
            tokens[name][int(np.searchsorted(where, self.start)) :] for name, _, where in images
        ]
        visual = inputs.visual[inputs.visual >= self.start] - self.start
        pictures = [pixels for _, pixels, _ in images]
        return Inputs(inputs.input_ids[:, self.start :], visual, pictures, rest)

    def keep_images(self) -> None:
        """Let others have the images that were encoded, once the first token is there."""
        for name, tokens in self.encoded.items():
            self.store.keep_image(self.model, name, tokens)

    def end(self, generated: Sequence[int]) -> None:
        """Remember the images, the prompt, and as much of the answer as went through the model.

        Of prompt and answer nothing where there is no token, where a rotating cache has begun to
        forget, or where parts would have come out otherwise than the whole.
        """
        self.keep_images()
        while self.encoded:
            self.store.write_image(self.model, *self.encoded.popitem())
        if not generated or not self.model.language_model.splits(len(self.keys)):
            return
        answer = np.zeros((len(generated), 3), np.int64)
        answer[:, 0] = generated
        keys = np.concatenate([self.keys, answer])
        layers: list[tuple[mx.array, ...]] = []
        for layer in self.cache:
            if (arrays := _held(layer)) is None:
                return
            layers.append(arrays)
            keys = keys[: layer.offset]
        packed = {len(arrays) > 2 for arrays in layers}
        if len(packed) > 1:  # it was broken off while they were being quantised
            return
        mx.eval(layers)  # a step that was broken off has not computed them
        packing = _packing(self.cache) if packed == {True} else None
        self.store.keep(self.model, keys, layers, packing)


def _fits(layer: Cache, length: int) -> bool:
    """Whether a prompt of `length` positions may start from known ones in this cache."""
    if type(layer) is RotatingKVCache:
        return length <= layer.max_size
    return type(layer) is KVCache


def _packing(cache: Sequence[Cache]) -> Packing | None:
    """How a prompt's caches are quantised, once they are long enough; None for plain ones."""
    if not isinstance(cache, QuantizingCaches):
        return None
    return cache.group_size, cache.bits, cache.start


def _held(layer: Cache) -> tuple[mx.array, ...] | None:
    """A cache's keys and values, None unless it holds all positions so far, in their order."""
    if type(layer) is RotatingKVCache:
        whole = layer.offset <= layer.max_size and layer.state[-1] == layer.offset
    else:
        whole = type(layer) in (KVCache, QuantizedKVCache)
    keys, values = layer.state[:2]
    if not whole or keys is None:
        return None
    return (*keys, *values) if isinstance(layer, QuantizedKVCache) else (keys, values)


def _fill(layer: Any, arrays: Sequence[mx.array], length: int) -> None:
    """Let a cache begin with the first `length` positions, as arrays of its own to write into."""
    used = [array[..., :length, :] for array in arrays]
    if isinstance(layer, RotatingKVCache):
        layer.state = (*used, length, layer.keep, layer.max_size, length)
    elif isinstance(layer, QuantizedKVCache):
        layer.keys, layer.values, layer.offset = used[:3], used[3:], length
    else:
        layer.state = (*used, length)
