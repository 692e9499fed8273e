"""A model's config -> what it costs: visual tokens, operations, bytes, memory, before it is loaded.

The model is built in its shapes and called on lazy arrays (counting.py); the family's own processor
tells what becomes of a picture. Nothing is evaluated, and no weights are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint import configs
from ..checkpoint.config import check, read_config, reading_values
from ..checkpoint.quantization import declared
from ..checkpoint.weights import DTYPES
from ..errors import UsageError
from ..hub.cache import usable_snapshot
from ..hub.models import ALIASES, DEMO, expanded, obtain, repo_id
from ..language.decoder import PREFILL_STEP
from ..models import family
from ..models.base import VisionLanguageModel
from ..models.build import cast, place_quantized_layers
from ..models.contract import Family
from ..picture.image import MAX_PIXELS, Pixels
from ..picture.preprocessing import AS_PUBLISHED, Preprocessing
from ..text.prompt import Inputs, Processor
from ..timings import watched
from .counting import Work, counting

Size = tuple[int, int]  # width, height
SQUARE = (1024, 1024)  # pixels of the picture where nothing else is said
TEXT_TOKENS = 64  # of a question, about
LANGUAGE = "language_model."
# What the CPU back end was seen to hold in float32 (mlx 0.32): FastViTHD at 256 and 512 pixels 7.7
# times its widest pass, a SmolVLM tile 9.2; a prefill of 512 positions 1.4 and 1.5 times a layer.
TOWER_HELD, DECODER_HELD = 8, 1.5


@dataclass(frozen=True)
class Blueprint:
    """A model that exists in its shapes only: nothing of it is evaluated yet."""

    family: Family[Any]
    config: Any
    model: VisionLanguageModel
    dtype: mx.Dtype
    asked: Preprocessing = AS_PUBLISHED

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, once they are there."""
        return nbytes(self.model)

    @property
    def bits(self) -> tuple[int, ...]:
        """The bits of its quantised layers, each once; none of a model that is not quantised."""
        return tuple(sorted({layer.bits for layer in self.model.modules() if "scales" in layer}))

    @property
    def processor(self) -> Processor:
        """The family's, without a tokenizer: it knows what becomes of pictures, not of words."""
        kind: Any = self.family.Processor
        processor: Processor = kind.__new__(kind)
        processor.config = self.config.adapted(self.asked)
        return processor

    def pixels(self, image: Size, among: int = 1) -> Pixels:
        """What becomes of a picture of that size, one of so many in its prompt.

        Raises UsageError for more visual tokens than it has.
        """
        processor = self.processor
        return processor.within(processor.preprocessor(among)(blank(image)), self.asked.budget)


def nbytes(part: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(array.nbytes for _, array in tree_flatten(part.parameters()))


def config_of(name: str) -> dict[str, Any]:
    """The native config of a folder, a Hub model that is here, or one whose config is shipped.

    Raises UsageError for a name that is none of these.
    """
    config = known_config(name)
    if config is None:
        raise UsageError(
            f"{repo_id(name)} is not on this machine: `mlx-vlm-edge models pull {name}` gets it; "
            "`mlx-vlm-edge models list --available` has those that are known without their files"
        )
    return config


def known_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """The native config of the model that `obtain` would give, as far as it is known without a
    download: of the files that are here, else as shipped; None where it is neither."""
    path = expanded(name)
    if name == DEMO or (name and path.exists()):
        return native(read_config(obtain(name, revision=revision)))
    repo = repo_id(name)
    if folder := usable_snapshot(repo, revision):
        return native(read_config(folder))
    alias = next((alias for alias, one in ALIASES.items() if one.lower() == repo.lower()), None)
    return None if alias is None else configs.read(alias)


def native(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as the families read it, whatever published layout it is in."""
    from mlx_vlm_edge_convert import native_config

    translated: dict[str, Any] = native_config(config)
    return translated


def blueprint(
    source: Mapping[str, Any],
    *,
    dtype: str | None = "bfloat16",
    quantization: Mapping[str, Any] | None = None,
    asked: Preprocessing = AS_PUBLISHED,
    fused: bool = False,
) -> Blueprint:
    """The shapes of a model by its native config.

    dtype: None for what `load` gives it on this device.
    quantization: as a config's block of that name has it (bits, group_size, mode, and names of
    layers with their own); the language model's linear layers and embeddings are quantised where it
    says nothing of a layer. fused: with the decoder's projections merged, as on a GPU.
    Raises UsageError for what the family refuses.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    kind = family(source)
    with reading_values("config.json"):
        config = kind.Config.from_dict(source)
        check(config)
        kind.check(config, asked)
        model = kind.Model(config)
    model.eval()
    model.apply(lambda p: p.astype(DTYPES[dtype or own_dtype(source)]))
    if quantization:
        _quantise(model, kind.rename, quantization)
    if dtype is None:
        cast(model, None)
    for layer in model.language_model.model.layers if fused else ():
        layer.fuse()
    return Blueprint(kind, config, model, model.language_model.model.norm.weight.dtype, asked)


def own_dtype(source: Mapping[str, Any]) -> str:
    """The checkpoint's, as transformers has written it: in the one key or the other."""
    parts = (source, source.get("text_config") or {})
    said = [part[key] for key in ("torch_dtype", "dtype") for part in parts if key in part]
    return next((name for name in said if name in DTYPES), "bfloat16")


def _quantise(model: nn.Module, rename: Callable[[str], str], block: Mapping[str, Any]) -> None:
    said = {rename(f"{path}.").rstrip("."): kind for path, kind in block.items()}
    paths = [
        path
        for path, layer in model.named_modules()
        if hasattr(layer, "to_quantized") and said.get(path, path.startswith(LANGUAGE)) is not False
    ]
    place_quantized_layers(model, paths, lambda path, _: declared(block, path, rename))


def blank(size: Size) -> Any:
    """A black picture. Raises UsageError for one that is empty or larger than can be read."""
    from PIL import Image

    width, height = size
    if min(size) < 1:
        raise UsageError(f"a picture of {width} x {height} pixels has nothing in it")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"a picture of {width:,} x {height:,} pixels has more than {MAX_PIXELS // 10**6} "
            "million: it would be refused"
        )
    return Image.new("RGB", size)


@dataclass(frozen=True)
class Cost:
    """What a prompt with pictures costs: until its first token, and one token after it.

    tiles: pictures that the vision tower sees, or each of several towers. reduction: what choosing
    some of the visual tokens costs the device. parameters: bytes of all weights. cached: bytes that
    one position takes in the KV cache. numbers: of which these are. context: positions that prompt
    and answer may have. pixels: bytes of the pictures. layers: of the decoder. whole: whether the
    prompt is prefilled in one part, however long.
    """

    tiles: int
    visual_tokens: int
    prompt_tokens: int
    vision: Work
    connector: Work
    reduction: Work
    prefill: Work
    step: Work
    parameters: int
    cached: int
    numbers: int
    context: int
    pixels: int
    layers: int
    whole: bool

    def memory(self, context: int, step: int = PREFILL_STEP) -> dict[str, int]:
        """Bytes of weights, of a KV cache of `context` positions, of activations and pictures.

        step: positions of a prompt that are computed together.

        Activations are a simple model: 8 times the widest pass of the vision tower or 1.5 times
        what a layer of the decoder passes on in one step of a prefill, whichever is more.
        """
        together = 1.0 if self.whole else min(1.0, step / self.prompt_tokens)
        prefill = DECODER_HELD * together * self.prefill.activations / self.layers
        parts = {
            "weights": self.parameters,
            "cache": self.cached * context,
            "activations": int(max(TOWER_HELD * self.vision.widest, prefill)) + self.pixels,
        }
        return {**parts, "total": sum(parts.values())}


def question(plan: Blueprint, image: Size = SQUARE, text_tokens: int = TEXT_TOKENS) -> Inputs:
    """A prompt of that length about a picture of that size, without words: to be counted only."""
    pixels = plan.pixels(image)
    visual = plan.processor.visual_tokens(pixels)
    ids = np.zeros((1, visual + text_tokens), np.int32)
    return Inputs(ids, np.arange(visual, dtype=np.int32), [pixels])


def cost(plan: Blueprint, inputs: Inputs) -> Cost:
    """Count a prompt on a model's shapes, as a GPU would run it."""
    model, length = plan.model, int(inputs.input_ids.shape[1])
    cache = model.make_cache()
    done: dict[str, Work] = {}
    with counting() as counter:

        def take(name: str, outcome: Any = None) -> None:
            done[name] = done.get(name, Work()) + counter.take()

        tokens = watched(model.encode(inputs.pixels), take)
        model.prefill(replace(inputs, tokens=tokens), cache, PREFILL_STEP)
        take("prefill")
        model.step(mx.zeros((1,), mx.int32), cache)
        step = counter.take()
    # each layer's keys and values, [B, heads, positions, D]
    kept = [array for layer in cache for array in layer.state if isinstance(array, mx.array)]
    data = [pixels.data for pixels in inputs.pixels]
    towers = len(getattr(model.tower, "towers", ())) or 1
    return Cost(
        tiles=sum(len(array) if array.ndim == 4 else 1 for array in data) // towers,
        visual_tokens=len(inputs.visual),
        prompt_tokens=length,
        vision=done.get("vision", Work()),
        connector=done.get("connector", Work()),
        reduction=done.get("reduce", Work()),
        prefill=done["prefill"],
        step=step,
        parameters=plan.nbytes,
        cached=sum(array.nbytes // array.shape[2] for array in kept),
        numbers=sum(array.size // array.shape[2] for array in kept),
        context=plan.config.context,
        pixels=sum(array.nbytes for array in data),
        layers=len(cache),
        whole=not model.language_model.splits(length),
    )
