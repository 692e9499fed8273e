"""A model's name -> (model, processor), strictly: every weight used, every parameter filled.

Folders in the native layout are read as they stand; any other published layout goes through the
converter, in memory. Folding and fusing happen here, once, before the first token.
"""

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import blas
from ..checkpoint.config import read_config
from ..checkpoint.weights import DTYPES, check_finite
from ..errors import UsageError
from ..hub.models import locate
from ..kernels import on_cpu, quantized
from ..models import family
from ..models.base import VisionLanguageModel
from ..models.build import Quantization, build, cast, read_native
from ..models.contract import Family
from ..picture.image import open_image
from ..picture.preprocessing import Preprocessing
from ..text.prompt import Processor
from ..text.tokenizer import Tokenizer
from .steps import Steps

BUILT, ENCODES, WHOLE = range(3)  # how far a model has been read
MAX_RESOLUTION = 8192  # pixels of a side that any model might be asked for
GROUP_SIZE = 64  # of quantisation at load
BLANK = 64  # side of a picture whose size as the model takes it is asked for


@dataclass(frozen=True)
class LoadOptions:
    """What `load` takes besides the name.

    dtype: "float32", "bfloat16" or "float16" for weights and activations. By default the
    checkpoint's on a GPU (the vision tower never in float16), and float32 on the CPU back end,
    whose half-precision matmuls are slow. revision: branch, tag or commit of a Hub model. quantize:
    4 or 8 bits for the language model, on the fly. offline: never touch the network.
    image_strategy ("pad", "center_crop", "stretch", ...) and resolution (pixels) override the
    checkpoint's own preprocessing, each as the family understands it; max_tiles limits what an
    image costs in the families that cut one up. jpeg_draft: decode large JPEGs at a part of their
    size, which is faster and not pixel-exact; results say so. vision_backend: "coreml" lets a Core
    ML package compute image features, in float16 on the Neural Engine and CPU; ":fp32" and
    ":cpu-gpu" behind it choose otherwise. It is exported and kept at the first use.
    """

    dtype: str | None = None
    revision: str | None = None
    quantize: int | None = None
    offline: bool = False
    image_strategy: str | None = None
    resolution: int | None = None
    max_tiles: int | None = None
    jpeg_draft: bool = False
    vision_backend: str = "mlx"

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.image_strategy, self.resolution, self.max_tiles)

    def check(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.resolution is not None and type(self.resolution) is not int:
            raise UsageError(
                f"resolution must be a whole number of pixels, not {self.resolution!r}"
            )
        if (self.resolution or 0) > MAX_RESOLUTION:
            raise UsageError(
                f"image size {self.resolution:,}: give at most {MAX_RESOLUTION:,} pixels"
            )


def load(name: str = "demo", **options: Any) -> tuple[VisionLanguageModel, Processor]:
    """Load a model by alias ("fastvlm-0.5b"), Hub id or folder. options: the fields of LoadOptions.

    Raises UsageError for anything that is missing, damaged or unknown.
    """
    model, processor = load_ahead(name, LoadOptions(**options))
    model.arrive()
    return model, processor


def load_ahead(name: str, options: LoadOptions) -> tuple[VisionLanguageModel, Processor]:
    """`load`, but on a CPU the language model is still being read when this returns.

    Until `model.arrive()` only `stream_generate` may use the model: it encodes the images first.
    A GPU's model is all there: nobody has seen whether its queue bears a second thread.
    """
    blas.check()
    options.check()
    folder = locate(name, revision=options.revision, offline=options.offline)
    if on_cpu():
        steps = Steps(_read(folder, options))
        kind, model = steps.wait(BUILT)
        model.arriving = lambda: steps.wait(WHOLE)
        tokenizer = Tokenizer.from_folder(folder)  # which takes as long as the tower's weights
        steps.wait(ENCODES)
    else:
        parsing = Steps(Tokenizer.from_folder(item) for item in (folder,))
        *_, (kind, model) = _read(folder, options)
        tokenizer = parsing.wait(0)
    processor = kind.Processor(model.config, tokenizer, options.preprocessing)
    processor.check_tokens()
    if options.vision_backend != "mlx":
        use_backend(model, processor, folder, options.vision_backend)
    if options.jpeg_draft:
        processor.draft_side()  # or a clear line
        processor.jpeg_draft = True
    return model, processor


def _read(folder: Path, options: LoadOptions) -> Iterator[tuple[Family[Any], VisionLanguageModel]]:
    """A folder's family and model, three times: BUILT, when it ENCODES images, and WHOLE."""
    config, arrays = read_checkpoint(folder)
    kind = family(config)
    model = build(kind, config, arrays)
    model.config.adapted(options.preprocessing)  # or a clear line
    if options.quantize is not None:
        quantize_language_model(model, config, options.quantize)
    cast(model, options.dtype)
    del arrays  # so that nothing is held twice
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


def use_backend(
    model: VisionLanguageModel, processor: Processor, weights: Path | str, setting: str
) -> None:
    """Have image features computed by another back end; notes of a first export go to stderr.

    weights: the checkpoint's folder, or a name for weights that have none. The package for the
    size of the processor's pictures is there when this returns.
    """
    from mlx_vlm_edge_convert.coreml.features import attach
    from mlx_vlm_edge_convert.coreml.run.cache import identity

    name = identity(weights) if isinstance(weights, Path) else weights
    pixels = processor.preprocess(open_image(np.zeros((BLANK, BLANK, 3), np.uint8)))
    size = pixels.data.shape[-3], pixels.data.shape[-2]
    attach(model, name, setting, partial(print, file=sys.stderr, flush=True), size)


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
    mx.eval(model.state)
    _give_back()


def _give_back() -> None:
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
        raise UsageError("the model is quantised already: leave quantize out")
    if bits not in (4, 8):
        raise UsageError(f"quantize={bits}: 4 or 8 bits are supported")
    for name, layer in model.language_model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding) and layer.weight.shape[-1] % GROUP_SIZE:
            raise UsageError(
                f"{name} is {layer.weight.shape[-1]} wide, which groups of {GROUP_SIZE} do not "
                f"divide: quantise with `mlx-vlm-edge convert --bits {bits} --group-size 32`"
            )
    nn.quantize(model.language_model, GROUP_SIZE, bits)
