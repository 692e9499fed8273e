"""A written model against its source, part by part: vision tower, connector, language model.

Both run the same small random inputs in float32; the decoder goes layer by layer, so that no more
than one layer of each is held in float32 at once.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.load import build, read_config
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.weights import find_shards, read_safetensors

SIDE = 128  # pixels; a FastViTHD takes any multiple of 64
TOKENS = 16
_SAME = 1e-5
# Relative errors that a sound conversion stays below (measured on random weights, whose errors are
# larger than trained ones'); a mistake in a layout gives about 1.
_DTYPES = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
_BITS = {8: 0.05, 6: 0.15, 5: 0.3, 4: 0.5, 3: 0.8, 2: 1.2}


class Tolerance(NamedTuple):
    """The largest relative error of the unquantised parts, and of the language model."""

    parts: float
    language_model: float


def tolerance(bits: int | None, dtype: str | None) -> Tolerance:
    """What the errors must stay below for a conversion to these bits and this dtype."""
    parts = _SAME if dtype is None else _DTYPES[dtype]
    return Tolerance(parts, parts if bits is None else max(parts, _BITS[bits]))


class Error(NamedTuple):
    """How far the output of one part is off: largest difference, and ||a - b|| / ||b||."""

    part: str
    largest: float
    relative: float


def verify(
    source: tuple[Mapping[str, Any], Mapping[str, mx.array]],
    written: Path,
    limit: Tolerance,
    report: Callable[[str], None],
) -> list[Error]:
    """Compare the model in the folder `written` with native config and weights.

    Raises UsageError when a part is off by more than `limit`.
    """
    config = read_config(written)
    arrays = read_safetensors(find_shards(written))
    model = build(family(config["model_type"]), config, arrays)
    reference = build(family(source[0]["model_type"]), *source)
    del arrays, source
    errors = list(compare(model, reference))
    for error in errors:
        report(f"  {error.part}: max abs {error.largest:.2e}, relative {error.relative:.2e}")
    for error in errors:
        allowed = limit.language_model if error.part == "language model" else limit.parts
        if not error.relative <= allowed:  # NaN fails too
            raise UsageError(
                f"the written {error.part} is off by {error.relative:.2e} (relative), more than "
                f"{allowed:.0e}; nothing was kept"
            )
    return errors


def compare(model: VisionLanguageModel, reference: VisionLanguageModel) -> Iterator[Error]:
    """The error of every part. Uses both models up: a part's memory is freed after its turn."""
    key = mx.random.key(0)
    pixels = mx.random.uniform(shape=(1, SIDE, SIDE, 3), key=key)
    features = _run("vision_tower", model, reference, pixels)
    yield _error("vision tower", *features)
    yield _error("connector", *_run("mm_projector", model, reference, features[1]))
    yield _error("language model", *_language_model(model, reference, key))


def _run(
    part: str, model: nn.Module, reference: nn.Module, x: mx.array
) -> tuple[mx.array, mx.array]:
    """Outputs of one part of both models for the same input; the part is then let go."""
    outputs = []
    for owner in (model, reference):
        module = owner.pop(part)
        outputs.append(_float32(module)(x))
    mx.eval(outputs)
    return outputs[0], outputs[1]


def _language_model(
    model: VisionLanguageModel, reference: VisionLanguageModel, key: mx.array
) -> tuple[mx.array, mx.array]:
    """Logits of both language models for the same random ids."""
    owners = [model.language_model, reference.language_model]
    vocabulary = owners[1].config.vocab_size
    ids = mx.random.randint(0, vocabulary, shape=(1, TOKENS), key=key)
    xs = [owner.embed(ids).astype(mx.float32) for owner in owners]
    for index in range(len(owners[1].model.layers)):
        xs = [
            _float32(owner.model.layers[index])(x, "causal", None)
            for owner, x in zip(owners, xs, strict=True)
        ]
        mx.eval(xs)
        for owner in owners:
            owner.model.layers[index] = nn.Identity()
    outputs = []
    for owner, x in zip(owners, xs, strict=True):
        owner.model.layers = []
        outputs.append(_float32(owner)(x))  # norm and head
    mx.eval(outputs)
    return outputs[0], outputs[1]


def _float32(module: nn.Module) -> nn.Module:
    module.apply(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p)
    return module


def _error(part: str, found: mx.array, expected: mx.array) -> Error:
    difference = np.abs(np.array(found - expected, dtype=np.float64))
    largest = float(difference.max())
    off = float(np.linalg.norm(difference) / np.linalg.norm(np.array(expected)))
    return Error(part, largest, off)
