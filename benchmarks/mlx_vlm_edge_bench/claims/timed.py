"""The parts of a claim's models, at full size with random weights, and the time each takes.

Tower, connector and language model by themselves, as the paper measures them: its TTFT is the
encoder's latency plus the language model's prefill of the visual tokens.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.checkpoint.weights import DTYPES
from mlx_vlm_edge.connectors.ldp import LDP, LDPv2
from mlx_vlm_edge.connectors.mlp import MLP
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.cache import Cache, KVCache
from mlx_vlm_edge.language.decoder import PREFILL_STEP, prefill
from mlx_vlm_edge.loading.cost import nbytes
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.timings import Clock, result
from mlx_vlm_edge.vision.vit import ViTConfig

from ..random.weights import blueprint, fill, usual_dtype
from .read import AFTER_TOKENS, Part
from .towers import bare_tower

TILES_AT_ONCE = 4
CHUNK = 512  # positions of a prefill that is measured in parts
LAYERS = 4  # of a language model that is measured in parts
DECODED = 8  # tokens of a decode that is measured in parts
TOWER = "tower:"  # before the name of a tower that no alias has
CONNECTORS = {"mlp2x": MLP, "ldp": LDP, "ldpv2": LDPv2}

Timed = Callable[[], float]  # runs a part once -> its seconds, or those it comes to


@dataclass(frozen=True)
class ModelParts:
    """A model's parts, in their shapes only; `config` is the family's.

    A tower by itself has nothing but a tower and a dtype.
    """

    config: Any
    tower: nn.Module
    connector: nn.Module | None
    language_model: Any
    dtype: mx.Dtype

    def connector_of(self, kind: str | None) -> nn.Module:
        """The model's connector, or one of another type for the same features and width."""
        if kind is None:
            if self.connector is None:
                raise UsageError("a tower by itself has no connector")
            return self.connector
        return CONNECTORS[kind](self.config.vision.hidden_size, self.config.text.hidden_size)


@cache
def model_parts(name: str, bits: int | None = None, layers: int | None = None) -> ModelParts:
    """The parts of an alias, or a tower that no alias has.

    bits: of the language model. layers: of it, the first so many where not all have room. Raises
    UsageError for a family without a tower and a connector.
    """
    if name.startswith(TOWER):
        tower, dtype = bare_tower(name.removeprefix(TOWER)), DTYPES[usual_dtype()]
        return ModelParts(None, tower, None, None, dtype)
    plan = blueprint(name, bits=bits)
    if plan.model.connector is None:
        raise UsageError(f"{name} has no vision tower and connector to measure by themselves")
    model = plan.model
    if layers is not None:
        model.language_model.model.layers = model.language_model.model.layers[:layers]
    return ModelParts(plan.config, model.tower, model.connector, model.language_model, plan.dtype)


def _layers(name: str) -> int:
    return len(model_parts(name).language_model.model.layers)


def middle(part: Part) -> int:
    """The positions before the middle one of the tokens that a part decodes."""
    return (part.tokens or 0) + part.times // 2


def side_of(model: ModelParts, resolution: int | None) -> int:
    """The side of a tile in pixels. Raises UsageError for one that the tower does not take."""
    if model.config is None:  # a tower by itself: it takes what its claim says
        if resolution is None:
            raise UsageError("a tower by itself needs a resolution")
        return resolution
    if not isinstance(model.config.vision, ViTConfig):  # FastViTHD and ConvNeXt take many sizes
        return int(model.config.adapted(Preprocessing(resolution=resolution)).image_size)
    side: int = model.config.vision.image_size
    if resolution not in (None, side):
        raise UsageError(f"image size {resolution}: this vision tower takes {side} only")
    return side


def features_shape(model: ModelParts, resolution: int | None) -> tuple[int, int, int]:
    """Of a tile's image features, [1, N, C], as the connector takes them."""
    side = side_of(model, resolution)
    if model.config is None:
        count, channels = model.tower(mx.zeros((1, side, side, 3), model.dtype)).shape[1:]
        return 1, count, channels
    vision = model.config.vision
    if isinstance(vision, ViTConfig):
        return 1, vision.grid**2, vision.hidden_size
    return 1, (side // vision.stride) ** 2, vision.out_dim


@dataclass
class PartTimer:
    """Makes the parts' weights when they are first needed, and times them.

    in_parts: one tile instead of several, of a long prefill its first and last chunk, and of a
    language model that has no room its first layers.
    """

    in_parts: bool
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        self._filled_modules: dict[tuple[str, str], nn.Module] = {}
        self._cut: set[str] = set()

    def timed(self, part: Part) -> Timed:
        """A function that runs the part once and gives its time."""
        kinds = {
            "vision": self._vision, "connector": self._connector,
            "prefill": self._prefill, "decode": self._decode,
        }  # fmt: skip
        return kinds[part.part](part)

    def how(self, part: Part) -> str:
        """In words what is run in place of the whole part; "" when it is run whole."""
        if not self.in_parts:
            return ""
        if part.part == "vision" and part.times > 1:
            return f"one tile times {part.times}"
        said = []
        if self._chunked(part):
            said.append(
                f"prefill of {part.tokens:,} from its first and its last {CHUNK} positions, the "
                "cost of those between growing evenly"
            )
        if part.part == "prefill" and part.model in self._cut:
            said.append(f"{LAYERS} of {_layers(part.model)} layers of {part.model}, all alike")
        if part.part == "decode" and part.times > DECODED:
            said.append(f"{DECODED} tokens in the middle of {part.times}")
        return "; ".join(said)

    def cut(self, parts: Iterable[Part]) -> bool:
        """Have prefills run in a model's first layers alone; whether any is measured so now."""
        if not self.in_parts:
            return False
        decoded = {part.model for part in parts if part.part == "decode"}
        prefilled = {part.model for part in parts if part.part == "prefill"}
        self._cut |= {name for name in prefilled - decoded if _layers(name) > LAYERS}
        return bool(self._cut)

    def missing(self, parts: Iterable[Part]) -> int:
        """Bytes of the weights that are still to be made for these parts."""
        wanted = {(part.model, self._name(part)): part for part in parts}
        return sum(
            nbytes(self._module(part))
            for key, part in wanted.items()
            if key not in self._filled_modules
        )

    def clear(self) -> None:
        """Forget all weights."""
        self._filled_modules.clear()
        self._cut.clear()
        model_parts.cache_clear()
        mx.clear_cache()

    def _parts(self, part: Part) -> ModelParts:
        """The parts of its model, in the first layers alone where the rest has no room."""
        few = part.part in AFTER_TOKENS and part.model in self._cut
        return model_parts(part.model, part.bits, LAYERS if few else None)

    def _name(self, part: Part) -> str:
        """Of the module: a prefill and a decode share a language model."""
        role = "language" if part.part in AFTER_TOKENS else part.part
        return f"{role} {part.type or ''} {part.bits or ''}"

    def _module(self, part: Part) -> nn.Module:
        model = self._parts(part)
        if part.part == "connector":
            return model.connector_of(part.type)
        return model.tower if part.part == "vision" else model.language_model

    def _filled(self, part: Part) -> nn.Module:
        """The module of a part, its weights made."""
        key = part.model, self._name(part)
        if key not in self._filled_modules:
            module, model = self._module(part), self._parts(part)
            fill(module, model.dtype)
            if part.part == "prefill":
                model.language_model.fuse()
            mx.eval(module.parameters())
            self._filled_modules[key] = module
        return self._filled_modules[key]

    def _once(self, run: Callable[[], Any], times: float = 1) -> float:
        started = self.clock()
        mx.eval(run())
        return (self.clock() - started) * times

    def _vision(self, part: Part) -> Timed:
        model = model_parts(part.model)
        tower = self._filled(part)
        whole = [part.times % TILES_AT_ONCE, *[TILES_AT_ONCE] * (part.times // TILES_AT_ONCE)]
        sizes = [1] if self.in_parts else [size for size in whole if size]
        side = side_of(model, part.resolution)
        noise = np.random.default_rng(3).random((max(sizes), side, side, 3), np.float32)
        pixels = mx.array(noise).astype(model.dtype)
        mx.eval(pixels)

        def run() -> None:
            for size in sizes:
                mx.eval(tower(pixels[:size]))

        return lambda: self._once(run, part.times / sum(sizes))

    def _connector(self, part: Part) -> Timed:
        model = model_parts(part.model)
        join = self._filled(part)
        shape = features_shape(model, part.resolution)
        noise = np.random.default_rng(3).standard_normal(shape, np.float32)
        features = mx.array(noise).astype(model.dtype)
        mx.eval(features)
        return lambda: self._once(lambda: join(features), part.times)

    def _decode(self, part: Part) -> Timed:
        """Greedy tokens after a cache of the prompt's length, each fed to the next step."""
        model = model_parts(part.model, part.bits)
        self._filled(part)
        steps = min(part.times, DECODED) if self.in_parts else part.times
        start = middle(part) - steps // 2
        prompt = Prompt(model, 1)

        def run() -> float:
            cache = prompt.cache_of(start)
            return self._once(lambda: prompt.decode(cache, steps), part.times / steps)

        return run

    def _prefill(self, part: Part) -> Timed:
        model = self._parts(part)
        self._filled(part)
        length = part.tokens or 1
        times = _layers(part.model) / len(model.language_model.model.layers)
        if not self._chunked(part):
            whole = Prompt(model, length)
            return lambda: self._once(whole.prefill_all, times)
        chunk = Prompt(model, CHUNK)

        def run() -> float:
            filled = chunk.cache_of(length - CHUNK)
            cost = self._once(chunk.fill_cache) + self._once(lambda: chunk.logits(filled))
            return cost / 2 * length / CHUNK * times

        return run

    def _chunked(self, part: Part) -> bool:
        return self.in_parts and part.part == "prefill" and (part.tokens or 0) > 3 * CHUNK


class Prompt:
    """Random input embeddings in the place of a prompt's, for a language model alone."""

    def __init__(self, model: ModelParts, length: int) -> None:
        self.language_model = model.language_model
        self._model, self._length = model, length
        noise = np.random.default_rng(4).standard_normal(
            (1, length, model.config.text.hidden_size), np.float32
        )
        self._embeddings = mx.array(noise).astype(model.dtype)
        mx.eval(self._embeddings)

    def prefill_all(self) -> mx.array:
        """Logits of the last position, by the runtime's own prefill."""
        cache = self.language_model.make_cache()
        return result(prefill(self.language_model, self._embeddings, cache, PREFILL_STEP))

    def fill_cache(self) -> list[Any]:
        """The keys and values of a first chunk: what a prefill waits for before the next."""
        cache = self.language_model.make_cache()
        self.language_model(self._embeddings, cache, last_only=True)
        return [layer.state for layer in cache]

    def logits(self, cache: Sequence[Cache]) -> mx.array:
        """Those of a last chunk's last position."""
        return self.language_model(self._embeddings, cache, last_only=True)

    def decode(self, cache: list[Cache], count: int) -> mx.array:
        """The last of `count` greedy tokens; a step is asked for while the one before is run."""
        token = mx.zeros((1, 1), mx.int32)
        for _ in range(count):
            embedded = self.language_model.embed(token)
            logits = self.language_model(embedded, cache, last_only=True)
            token = mx.argmax(logits, axis=-1).reshape(1, 1)
            mx.async_eval(token)
        return token

    def cache_of(self, length: int) -> list[Cache]:
        """Caches that hold `length` positions: of zeros, whose cost is that of any others."""
        text = self._model.config.text
        shape = (1, text.num_key_value_heads, length, text.head_dim)
        caches: list[Cache] = []
        for _ in self.language_model.model.layers:
            layer = KVCache()
            if length:
                layer.update_and_fetch(*(mx.zeros(shape, self._model.dtype) for _ in range(2)))
            caches.append(layer)
        mx.eval([layer.state for layer in caches if length])
        return caches
