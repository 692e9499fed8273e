"""A written model against its source, part by part: vision tower, connector, language model.

Both run the same random inputs in float32: the family's probe image through `encode_image`, whose
stages are compared as they are marked, and random tokens through the decoder, layer by layer, so
that no more than one layer of each is held in float32 at once.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.image import Pixels
from mlx_vlm_edge.load import build, read_config
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.timings import Stages
from mlx_vlm_edge.weights import find_shards, read_safetensors

TOKENS = 16
_SAME = 1e-5
_PARTS = {"vision": "vision tower"}  # stages whose part has another name
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
    probe: Pixels,
    limit: Tolerance,
    report: Callable[[str], None],
) -> list[Error]:
    """Compare the model in the folder `written` with native config and weights.

    probe: an image as the family's preprocessing makes them.

    Raises UsageError when a part is off by more than `limit`.
    """
    config = read_config(written)
    arrays = read_safetensors(find_shards(written))
    model = build(family(config["model_type"]), config, arrays)
    reference = build(family(source[0]["model_type"]), *source)
    del arrays, source
    errors = list(compare(model, reference, probe))
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


class _Recorder(Stages):
    """Keeps what each stage came out with, by the part's name."""

    def __init__(self) -> None:
        super().__init__(measured=True)
        self.outputs: dict[str, mx.array] = {}

    def mark(self, name: str, *arrays: mx.array) -> None:
        mx.eval(*arrays)
        if arrays:
            self.outputs[_PARTS.get(name, name)] = arrays[0]


def compare(
    model: VisionLanguageModel, reference: VisionLanguageModel, probe: Pixels
) -> Iterator[Error]:
    """The error of every part. Uses both models up: a part's memory is freed after its turn."""
    found, expected = (_stages(owner, probe) for owner in (model, reference))
    for part, output in expected.items():
        yield _error(part, found[part], output)
    yield _error("language model", *_language_model(model, reference))


def _stages(model: VisionLanguageModel, probe: Pixels) -> dict[str, mx.array]:
    """What each stage of an image's encoding gives; all parts but the decoder are then let go."""
    recorder = _Recorder()
    parts = [name for name in model.children() if name != "language_model"]
    for part in parts:
        _float32(model[part])
    model.encode_image(probe, recorder)
    for part in parts:
        model.pop(part)
    return recorder.outputs


def _language_model(
    model: VisionLanguageModel, reference: VisionLanguageModel
) -> tuple[mx.array, mx.array]:
    """Logits of both language models for the same random ids."""
    owners = [model.language_model, reference.language_model]
    vocabulary = owners[1].config.vocab_size
    ids = mx.random.randint(0, vocabulary, shape=(1, TOKENS), key=mx.random.key(0))
    xs = [owner.embed(ids).astype(mx.float32) for owner in owners]
    for index in range(len(owners[1].model.layers)):
        xs = [_through(owner.blocks(index), x) for owner, x in zip(owners, xs, strict=True)]
        mx.eval(xs)
        for owner in owners:
            owner.model.layers[index] = nn.Identity()
    outputs = []
    for owner, x in zip(owners, xs, strict=True):
        owner.model.layers = []
        outputs.append(_float32(owner)(x))  # norm and head
    mx.eval(outputs)
    return outputs[0], outputs[1]


def _through(blocks: list[nn.Module], x: mx.array) -> mx.array:
    """One layer's blocks after one another."""
    for block in blocks:
        x = _float32(block)(x, "causal", None)
    return x


def _float32(module: nn.Module) -> nn.Module:
    module.apply(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p)
    return module


def _error(part: str, found: mx.array, expected: mx.array) -> Error:
    difference = np.abs(np.array(found - expected, dtype=np.float64))
    largest = float(difference.max())
    off = float(np.linalg.norm(difference) / np.linalg.norm(np.array(expected)))
    return Error(part, largest, off)
