"""The text before a prompt's first picture -> its keys and values, computed once for each model.

System prompt and the words around it are the same from one prompt to the next, and no picture
changes them: where they are known, prefill starts at the picture. What is remembered, and how much
of another prompt it is the beginning of, is the prefix cache's affair; here is which part of a
prompt that is, and whether the model is still the one that computed it.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from ..kernels import on_cpu
from ..language.cache import Cache, KVCache
from ..language.decoder import PREFILL_STEP
from ..models.base import VisionLanguageModel
from ..text.prompt import Inputs, Processor
from ..timings import Steps

if TYPE_CHECKING:
    from .prefix import Layers

MAX_BYTES = 64 * 2**20  # of each model
Weights = list[weakref.ref[mx.array]]
# Positions times the width's square: 24 times that are a layer's operations, of which an Apple GPU
# does at most 16 million in the microsecond that the host needs for a node; a layer has about 30.
WORTH = 2e7


class Begun(Protocol):
    """A prompt of which `start` positions need not be computed; `reused` an earlier prompt had."""

    @property
    def start(self) -> int: ...
    @property
    def reused(self) -> int: ...

    def encode(self) -> Steps[Inputs]: ...
    def keep_images(self) -> None: ...
    def end(self, generated: Sequence[int]) -> None: ...


class Remembers(Protocol):
    """A prefix cache, or what of one is remembered without being asked for."""

    def begin(
        self, model: VisionLanguageModel, processor: Processor, inputs: Inputs, cache: list[Cache]
    ) -> Begun: ...


class Openings:
    """What one model's prompts had before their first pictures, least recently used out.

    Weights that were exchanged since (an adapter, a training step, another precision) are noticed,
    since their arrays are others. Those that were written into are not: `clear` is for that.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        from .prefix import PrefixCache  # which the first prompt has no use for

        self._known = PrefixCache(max_bytes)
        self._weights: Weights = []

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._known.nbytes

    def clear(self) -> None:
        self._known.clear()

    def take(self, model: VisionLanguageModel, ids: np.ndarray, cache: list[Cache]) -> int:
        """Put what is known of an opening, all but the last of `ids`, into `cache`: how much."""
        return self._known.take(model, _keys(ids), cache) if self._same(model) else 0

    def knows(self, model: VisionLanguageModel, ids: np.ndarray) -> bool:
        return self._same(model) and self._known.known(model, _keys(ids)) == len(ids)

    def keep(
        self, model: VisionLanguageModel, ids: np.ndarray, cache: list[Cache], wait: bool = True
    ) -> None:
        """Remember the keys and values of a prompt's first positions.

        wait: until they are there. What is not computed yet is of use to this thread alone.
        """
        layers = _first(cache, len(ids))
        if sum(array.nbytes for layer in layers for array in layer) <= self._known.max_bytes:
            self._same(model)
            (mx.eval if wait else mx.async_eval)(layers)
            self._known.keep(model, _keys(ids), layers)

    def _same(self, model: VisionLanguageModel) -> bool:
        """Whether the language model has the arrays of the last call; else all is forgotten."""
        known, self._weights = self._weights, _weights(model)
        same = _unchanged(known, self._weights)
        if not same:
            self.clear()
        return same


def openings(model: VisionLanguageModel) -> Openings:
    """The model's own."""
    if model.openings is None:
        model.openings = Openings()
    store: Openings = model.openings
    return store


class Opening:
    """The opening of one prompt, taken from `model.openings` and remembered there.

    step: positions that are computed together, at most.
    """

    def __init__(self, model: VisionLanguageModel, step: int = PREFILL_STEP) -> None:
        self.model, self.step = model, step
        self._ahead = False

    def ahead(
        self, verbose: bool, max_kv_size: int | None
    ) -> Callable[[Sequence[int]], None] | None:
        """What begins it while the picture is read; None where the device has no time for that, a
        run that is timed in stages waits for each, or a rotating cache takes no opening."""
        alone = verbose or max_kv_size is not None or not idle_meanwhile()
        return None if alone else self.set_out

    def set_out(self, ids: Sequence[int]) -> None:
        """Begin what is not known while the picture is being read; waits for nothing."""
        model, opening = self.model, np.array(ids)
        if worth_ahead(model, len(ids), self.step) and not openings(model).knows(model, opening):
            cache = model.make_cache()
            embeddings = model.language_model.embed(mx.array(opening)[None])
            model.language_model(embeddings, cache, last_only=True)
            openings(model).keep(model, opening, cache, wait=False)
            self._ahead = True

    def begin(
        self, model: VisionLanguageModel, processor: Processor, inputs: Inputs, cache: list[Cache]
    ) -> "Opened":
        """Fill `cache` (empty until now) with what is known of the prompt's opening."""
        length, start = int(inputs.visual[0]) if len(inputs.visual) else 0, 0
        whole, language = inputs.input_ids.shape[1], model.language_model
        if model.unread is not None or not _plain(cache) or not language.splits(whole):
            length = 0
        elif length and model.openings is not None:
            start = model.openings.take(model, inputs.input_ids[0, : length + 1], cache)
        reused = 0 if self._ahead else start
        weights = _weights(model) if start < length else []
        return Opened(model, inputs, cache, length, start, reused, weights)


@dataclass(frozen=True, eq=False)
class Opened:
    """One prompt on its way through the model.

    length: positions before the first picture that may be remembered. start: those that were known,
    and reused: those that an earlier prompt had computed. weights: what computes the others.
    """

    model: VisionLanguageModel
    inputs: Inputs
    cache: list[Cache]
    length: int
    start: int
    reused: int
    weights: Weights

    def encode(self) -> Steps[Inputs]:
        """The prompt from `start` on with its visual tokens."""
        inputs = self.inputs
        tokens = inputs.tokens
        if tokens is None:
            tokens = yield from self.model.encode(inputs.pixels)
        ids, visual = inputs.input_ids[:, self.start :], inputs.visual - self.start
        return replace(inputs, input_ids=ids, visual=visual, tokens=tokens)

    def keep_images(self) -> None:
        """Before an opening's end there are none."""

    def end(self, generated: Sequence[int]) -> None:
        """Remember the opening, where that was not all known and is all there, and of this model:
        a stream may be abandoned long before it is closed."""
        if not generated or self.start == self.length or not _plain(self.cache):
            return
        if _unchanged(self.weights, _weights(self.model)):
            ids = self.inputs.input_ids[0, : self.length]
            openings(self.model).keep(self.model, ids, self.cache)


def worth_ahead(model: VisionLanguageModel, length: int, step: int = PREFILL_STEP) -> bool:
    """Whether an opening of so many positions is computed while its picture is being read.

    A CPU reads the picture with the cores that would compute, and reads all weights twice; CUDA's
    devices are held up by launches, which a second pass doubles.
    """
    width = model.language_model.config.hidden_size
    if model.unread is not None or not idle_meanwhile() or length > step:
        return False  # a longer one is prefilled in chunks
    return length * width**2 >= WORTH and model.language_model.splits(length)


def idle_meanwhile() -> bool:
    """Whether the device has arithmetic to spare while the host reads a picture."""
    return not on_cpu() and mx.metal.is_available()


def _weights(model: VisionLanguageModel) -> Weights:
    return [weakref.ref(array) for array in _arrays(model.language_model)]


def _unchanged(before: Weights, now: Weights) -> bool:
    """Whether a model has the arrays that it had."""
    return len(before) == len(now) and all(
        one() is not None and one() is other() for one, other in zip(before, now, strict=True)
    )


def _arrays(module: Any) -> list[mx.array]:
    """All that a module holds, in an order of its own: without names, since every prompt asks."""
    arrays: list[mx.array] = []
    left: list[Any] = [[module]]
    while left:
        part = left.pop()
        for inner in part.values() if isinstance(part, dict) else part:
            if isinstance(inner, mx.array):
                arrays.append(inner)
            elif isinstance(inner, dict | list):  # a module is one
                left.append(inner)
    return arrays


def _keys(ids: Any) -> np.ndarray:
    """Text's positions as the prefix cache names them, int64 [L, 3]."""
    keys = np.zeros((len(ids), 3), np.int64)
    keys[:, 0] = ids
    return keys


def _plain(cache: Sequence[Cache]) -> bool:
    return bool(cache) and all(type(layer) is KVCache for layer in cache)


def _first(cache: Sequence[Any], length: int) -> "Layers":
    """The first positions' keys and values of plain caches, in arrays of their own."""
    return [
        (mx.contiguous(layer.keys[..., :length, :]), mx.contiguous(layer.values[..., :length, :]))
        for layer in cache
    ]
