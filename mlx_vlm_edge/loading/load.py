"""A model's name -> (model, processor), strictly: every weight used, every parameter filled.

Folders in the native layout are read as they stand; any other published layout goes through the
converter, in memory. Folding and fusing happen here, once, before the first token.
"""

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import blas, forked
from ..checkpoint.adapter import Adapter
from ..checkpoint.adapter_choice import choices
from ..checkpoint.config import read_config
from ..checkpoint.quantization import GROUP_SIZE
from ..checkpoint.weights import DTYPES, check_finite
from ..errors import UsageError, check_keywords
from ..hub.models import obtain
from ..kernels import on_cpu, quantized
from ..models import family
from ..models.adapted import Adapted
from ..models.base import VisionLanguageModel
from ..models.build import Quantization, build, cast, read_native
from ..models.contract import Family
from ..picture import imageio
from ..picture.image import open_image
from ..picture.preprocessing import Preprocessing
from ..picture.token_budget import TokenBudget, token_budget
from ..text import saved_tokenizer
from ..text.mapped_tokenizer import MappedTokenizer
from ..text.prompt import Processor
from ..text.tokenizer import Tokenizer
from .adapters import adapted, read_adapters
from .steps import Background, Steps, stop_if_exiting
from .unapplied import tell_unapplied

BUILT, ENCODES, WHOLE = range(3)  # how far a model has been read
MAX_RESOLUTION = 8192  # pixels of a side that any model might be asked for
BLANK = 64  # side of a picture whose size as the model takes it is asked for


@dataclass(frozen=True)
class LoadOptions:
    """What `load` takes besides the name.

    dtype: "float32", "bfloat16" or "float16" for weights and activations. By default the
    checkpoint's on a GPU (the vision tower never in float16), and float32 on the CPU back end,
    whose half-precision matmuls are slow. revision: branch, tag or commit of a Hub model. bits: 4
    or 8 for the language model, quantised on the fly. offline: never touch the network, for the
    pictures of a prompt neither.
    image_strategy ("pad", "center_crop", "stretch", ...) and resolution (pixels) override the
    checkpoint's own preprocessing, each as the family understands it; resolution "auto", which
    FastVLM has, chooses by a picture's size and detail, up to max_resolution. max_tiles limits what
    an image costs in the families that cut one up. visual_tokens: how many the language model sees
    of each image, a whole number or a share as 0.25, and token_method: which these are ("divprune"
    by default, "dpp", "pool", "random", and where the tower's attention is to be had "hiprune" and
    "visionzip"). jpeg_draft: decode large JPEGs at a part of their
    size, which is faster and not pixel-exact; results say so. vision_backend: "coreml" lets a Core
    ML package compute image features, in float16 on the Neural Engine and CPU; ":fp32" and
    ":cpu-gpu" behind it choose otherwise. It is exported and kept at the first use.
    adapter: a folder of PEFT's, mlx-lm's, mlx-vlm's or LLaVA's, "folder:0.5" or (folder, 0.5) for
    half of its update, or a list of such; the model answers with it.
    """

    dtype: str | None = None
    revision: str | None = None
    bits: int | None = None
    offline: bool = False
    image_strategy: str | None = None
    resolution: int | str | None = None
    max_tiles: int | None = None
    jpeg_draft: bool = False
    vision_backend: str = "mlx"
    visual_tokens: int | float | None = None
    token_method: str | None = None
    max_resolution: int | None = None
    adapter: Any = None

    @property
    def budget(self) -> TokenBudget | None:
        return token_budget(self.visual_tokens, self.token_method)

    @property
    def preprocessing(self) -> Preprocessing:
        auto = isinstance(self.resolution, str)
        pixels = None if isinstance(self.resolution, str) else self.resolution
        return Preprocessing(
            self.image_strategy, pixels, self.max_tiles, self.budget, auto, self.max_resolution
        )

    def check(self) -> None:
        """Raises UsageError for all that can be told before a model is looked for."""
        for name in ("bits", "max_tiles", "max_resolution"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")
        _ = self.budget  # or a clear line
        if self.bits not in (None, 4, 8):
            raise UsageError(f"bits must be 4 or 8, not {self.bits}")
        if self.vision_backend != "mlx":
            from mlx_vlm_edge_convert.coreml.features import parse

            parse(self.vision_backend)
        choices(self.adapter)  # or a clear line
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        self._check_resolution()

    def _check_resolution(self) -> None:
        pixels, auto = self.resolution, self.resolution == "auto"
        if pixels is not None and not auto and type(pixels) is not int:
            raise UsageError(f"resolution must be a whole number of pixels or auto, not {pixels!r}")
        if isinstance(pixels, int) and pixels > MAX_RESOLUTION:
            raise UsageError(f"image size {pixels:,}: give at most {MAX_RESOLUTION:,} pixels")
        if self.max_resolution is not None and not auto:
            raise UsageError("max_resolution limits resolution auto: leave it out")
        if auto and self.vision_backend != "mlx":
            raise UsageError(
                "resolution auto: a Core ML package has one size: give pixels, or leave the vision "
                "backend out"
            )


class LoadKeywords(TypedDict, total=False):
    """The fields of LoadOptions, for type checkers; `quantize` is what `bits` was called."""

    dtype: str | None
    revision: str | None
    bits: int | None
    offline: bool
    image_strategy: str | None
    resolution: int | str | None
    max_tiles: int | None
    jpeg_draft: bool
    vision_backend: str
    visual_tokens: int | float | None
    token_method: str | None
    max_resolution: int | None
    adapter: Any
    quantize: int | None


def ignored(part: str) -> None:
    """For who is not to be told."""


def load(
    name: str = "demo", **options: Unpack[LoadKeywords]
) -> tuple[VisionLanguageModel, Processor]:
    """Load a model by alias ("fastvlm-0.5b"), Hub id or folder. options: the fields of LoadOptions.

    Raises UsageError for anything that is missing, damaged or unknown.
    """
    model, processor = start_loading(name, _load_options(options))
    model.finish_loading()
    return model, processor


def _load_options(options: LoadKeywords) -> LoadOptions:
    keywords: dict[str, Any] = {**options}
    if "quantize" in keywords:
        warnings.warn("load's quantize is called bits", DeprecationWarning, stacklevel=3)
        bits = keywords.pop("quantize")
        if keywords.setdefault("bits", bits) != bits:
            raise UsageError("bits and quantize are the same: leave quantize out")
    check_keywords("load", keywords, LoadOptions)
    return LoadOptions(**keywords)


def start_loading(
    name: str, options: LoadOptions, told: Callable[[str], None] = ignored
) -> tuple[VisionLanguageModel, Processor]:
    """`load`, but on a CPU the language model is still being read when this returns.

    Until `model.finish_loading()` only `stream_generate` may use it: it encodes the images first.
    A GPU's model is all there: nobody has seen whether its queue bears a second thread.
    told: what this thread has just waited for, "weights" or "tokenizer".
    """
    blas.check()
    forked.check()
    options.check()
    imageio.asked()  # or a clear line
    chosen = choices(options.adapter)
    adapters = read_adapters(chosen)  # before a model is looked for
    changed = [choice.identity() for choice in chosen]  # of what was read, whatever becomes of it
    folder = obtain(name, revision=options.revision, offline=options.offline)
    if on_cpu():
        steps = Steps(_reading(folder, options, adapters))
        kind, model = steps.wait(BUILT)
        told("weights")
        model.unread = lambda: steps.wait(WHOLE)
        tokenizer = Tokenizer.from_folder(folder)  # which takes as long as the tower's weights
        told("tokenizer")
        steps.wait(ENCODES)
        told("weights")
    else:
        parsing = Background(lambda: Tokenizer.from_folder(folder))
        *_, (kind, model) = _reading(folder, options, adapters)
        told("weights")
        tokenizer = parsing.wait()
        told("tokenizer")
    if not isinstance(tokenizer.backend, MappedTokenizer):
        Background(lambda: saved_tokenizer.remember(folder))  # for the next process
    tokenizer.check_rows(model.config.text.vocab_size)
    tell_unapplied(folder, tokenizer.special_ids)
    model.identify = partial(model_identity, folder, options, on_cpu(), changed)
    processor = kind.Processor(model.config, tokenizer, options.preprocessing)
    processor.check_tokens()
    processor.offline = options.offline
    if options.vision_backend != "mlx":
        use_backend(model, processor, folder, options.vision_backend)
    if options.jpeg_draft:
        processor.draft_side()  # or a clear line
        processor.jpeg_draft = True
    return model, processor


def _reading(
    folder: Path, options: LoadOptions, adapters: Sequence[Adapter] = ()
) -> Iterator[tuple[Family[Any], VisionLanguageModel]]:
    """A folder's family and model, three times: BUILT, when it ENCODES images, and WHOLE."""
    config, arrays = read_checkpoint(folder)
    kind = family(config)
    whole = adapted(config, arrays, adapters)
    check_backend(whole, adapters, options)
    model = built(kind, config, whole, options)
    del arrays, whole  # so that nothing is held twice
    yield kind, model
    # `state` has what `parameters` leave out as well, such as scaled rotation periods: another
    # thread cannot use an array that this one leaves unevaluated.
    mx.eval([part.state for name, part in _parts(model) if name != "language_model"])
    mx.eval(model.language_model.model.embed_tokens.state)  # where Fuyu has its newline
    yield kind, model
    arrange(model)
    # Norms and biases alone: they are small, and where a dtype is too narrow they show it as well.
    parameters = tree_flatten(model.parameters())
    check_finite({name: array for name, array in parameters if array.ndim == 1})
    yield kind, model


def check_backend(weights: Adapted, adapters: Sequence[Adapter], options: LoadOptions) -> None:
    """Raises UsageError for adapters that another back end would encode pictures without."""
    if weights.tower_changed and options.vision_backend != "mlx":
        raise UsageError(
            f"{adapters[0].called}: it changes the vision tower, which {options.vision_backend} "
            "would run without; `mlx-vlm-edge convert --adapter` makes one model of both"
        )


def built(
    kind: Family[Any], config: Mapping[str, Any], weights: Adapted, options: LoadOptions
) -> VisionLanguageModel:
    """The model as the options want it; nothing is evaluated yet."""
    model = build(kind, config, weights.arrays)
    weights.place(model, kind.rename)
    kind.check(model.config, options.preprocessing)
    if options.bits is not None:
        quantize_language_model(model, config, options.bits)
    cast(model, options.dtype)
    return model


def model_identity(folder: Path, options: LoadOptions, cpu: bool, changed: Sequence[str]) -> str:
    """cpu: where it was loaded, which decides on dtypes and kernels. changed: by which adapters."""
    from ..checkpoint.identity import identity

    told = options.dtype, options.bits, options.vision_backend, cpu
    return f"{identity(folder)} {told} {list(changed)}" if changed else f"{identity(folder)} {told}"


def use_backend(
    model: VisionLanguageModel, processor: Processor, weights: Path | str, setting: str
) -> None:
    """Have image features computed by another back end; notes of a first export go to stderr.

    weights: the checkpoint's folder, or a name for weights that have none. The package for the
    size of the processor's pictures is there when this returns.
    """
    from mlx_vlm_edge_convert.coreml.features import attach
    from mlx_vlm_edge_convert.coreml.run.cache import label

    name = called = str(weights)
    if isinstance(weights, Path):
        from ..checkpoint.identity import identity

        name, called = identity(weights), label(weights)
    pixels = processor.preprocess(open_image(np.zeros((BLANK, BLANK, 3), np.uint8)))
    size = pixels.data.shape[-3], pixels.data.shape[-2]
    attach(model, name, setting, partial(print, file=sys.stderr, flush=True), size, called)


def arrange(model: VisionLanguageModel) -> None:
    """Merge projections and lay quantised weights out for the device; all is computed after it.

    Plain projections stay apart on a CPU: merged ones are no faster there, and the copy would
    hold up the first token. Quantised layers are read, merged and turned one after the other.
    """
    language = model.language_model
    if not on_cpu():
        language.fuse()
    elif any(isinstance(layer, nn.QuantizedLinear) for layer in language.modules()):
        quantized.for_cpu(model, but="layers")  # the large embedding, before more is in memory
        language.fuse(quantized.for_cpu)
    if on_cpu():
        quantized.for_cpu(model)  # a connector, say
    for layer in language.model.layers:
        stop_if_exiting()  # nobody may be waiting any more
        mx.eval(layer.state)
    mx.eval(model.state)
    give_back()


def give_back() -> None:
    """Hand the memory that reading took and freed to the system; MLX and glibc would keep it."""
    mx.clear_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in model.children().items() if isinstance(part, nn.Module))


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Config and native weights of a folder, converting in memory where its layout is another."""
    config = read_config(folder)
    arrays = read_native(folder, config)
    if arrays is not None:
        return config, arrays
    from mlx_vlm_edge_convert import to_native

    converted: tuple[dict[str, Any], dict[str, mx.array]] = to_native(folder, config)
    return converted


def quantize_language_model(model: VisionLanguageModel, config: Quantization, bits: int) -> None:
    if config.get("quantization"):
        raise UsageError("the model is quantised already: leave bits out")
    for name, layer in model.language_model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding) and layer.weight.shape[-1] % GROUP_SIZE:
            raise UsageError(
                f"{name} is {layer.weight.shape[-1]} wide, which groups of {GROUP_SIZE} do not "
                f"divide: quantise with `mlx-vlm-edge convert --bits {bits} --group-size 32`"
            )
    nn.quantize(model.language_model, GROUP_SIZE, bits)


Options, load_ahead = LoadOptions, start_loading  # their old names
