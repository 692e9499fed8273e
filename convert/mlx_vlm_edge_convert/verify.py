"""A written model against its source, part by part: vision tower, connector, decoder, logits.

Both run the same random inputs in float32: the family's probe image through `encode_image`, whose
stages are compared one by one, and random tokens through the decoder, layer by layer, so
that no more than one layer of each is held in float32 at once. A source in the training form also
has its branches run one by one, each sum against the written kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.checkpoint.files import SAFETENSORS, weight_files
from mlx_vlm_edge.checkpoint.weights import read_safetensors
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.decoder import LanguageModel
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.models.build import build
from mlx_vlm_edge.picture.image import Pixels

from . import branches

TOKENS = 16
BRANCHES = "merged branches"
Native = tuple[Mapping[str, Any], Mapping[str, mx.array]]

_PARTS = {"vision": "vision tower"}  # stages whose part has another name
_SAME = 1e-5
# Relative errors that a sound conversion stays below, from random weights, which suffer more than
# trained ones. Unrelated outputs are off by 1.4. Quantised layers are held to the first number one
# by one, on the source's own inputs, and the logits to the second, where their errors add up.
_DTYPES = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
_BITS = {
    8: (0.03, 0.2),
    6: (0.08, 0.5),
    5: (0.15, 0.8),
    4: (0.3, 1.1),
    3: (0.6, 1.3),
    2: (1.2, 1.5),
}


def tolerances(bits: int | None, dtype: str | None) -> dict[str, float]:
    """What the error of a part must stay below, for a conversion to bits and dtype.

    "parts" is for every part that is not named.
    """
    cast = _SAME if dtype is None else _DTYPES[dtype]
    layer, logits = (cast, cast) if bits is None else (max(cast, limit) for limit in _BITS[bits])
    return {
        "parts": cast,
        "decoder layers": layer,
        "logits": logits,
    }


class Error(NamedTuple):
    """How far the output of one part is off: largest difference, and ||a - b|| / ||b||."""

    part: str
    largest: float
    relative: float


def verify(
    source: Callable[[], Native],
    written: Path,
    probe: Pixels,
    limits: Mapping[str, float],
    report: Callable[[str], None],
    unmerged: Mapping[str, mx.array] | None = None,
) -> list[Error]:
    """Compare the model in the folder `written` with the config and weights that `source` reads.

    probe: an image as the family's preprocessing makes them.
    unmerged: the source's weights with their branches apart, where it is in the training form.
    Raises UsageError when a part is off by more than its limit.
    """
    errors: list[Error] = []
    if unmerged:
        kernels = _read(written)[1]
        errors.append(_branch_error(unmerged, kernels))
        limits = {**limits, BRANCHES: _rounding(kernels)}
        del kernels
    errors += compare(_build(_read(written)), _build(source()), probe)
    allowances = [limits.get(error.part, limits["parts"]) for error in errors]
    for error, allowed in zip(errors, allowances, strict=True):
        report(
            f"  {error.part}: max abs {error.largest:.2e}, relative {error.relative:.2e} "
            f"(at most {allowed:.0e})"
        )
    for error, allowed in zip(errors, allowances, strict=True):
        if not error.relative <= allowed:  # NaN fails too
            raise UsageError(
                f"the written model is wrong: {error.part} off by {error.relative:.2e} (relative), "
                f"more than {allowed:.0e}; nothing was kept"
            )
    report("verified: every part is within its limit")
    return errors


def _read(folder: Path) -> Native:
    return read_config(folder), read_safetensors(weight_files(folder, [SAFETENSORS]))


def _build(native: Native) -> VisionLanguageModel:
    """The model of native config and weights, which nothing else then holds."""
    config, weights = native
    return build(family(config), config, weights)


def _branch_error(unmerged: Mapping[str, mx.array], written: Mapping[str, mx.array]) -> Error:
    """The largest error of any merged kernel."""
    errors = [_error(BRANCHES, *pair) for pair in branches.outputs(unmerged, written)]
    largest = max(error.largest for error in errors)
    return Error(BRANCHES, largest, max(error.relative for error in errors))


def _rounding(written: Mapping[str, mx.array]) -> float:
    """What rounding to the written kernels' dtype may cost."""
    dtypes = {array.dtype for name, array in written.items() if name.endswith("conv.weight")}
    return max(limit for name, limit in _DTYPES.items() if getattr(mx, name) in dtypes)


def compare(
    model: VisionLanguageModel, reference: VisionLanguageModel, probe: Pixels
) -> Iterator[Error]:
    """The error of every part. Uses both models up: a part's memory is freed after its turn."""
    outputs, expected = (_stages(owner, probe) for owner in (model, reference))
    for part, output in expected.items():
        yield _error(part, outputs[part], output)
    yield from _language_model(model.language_model, reference.language_model)


def _stages(model: VisionLanguageModel, probe: Pixels) -> dict[str, mx.array]:
    """What each stage of an image's encoding gives; all parts but the decoder are then let go."""
    parts = [name for name in model.children() if name != "language_model"]
    for part in parts:
        _float32(model[part])
    outputs: dict[str, mx.array] = {}
    for name, output in model.stages(probe):
        mx.eval(output)
        part = _PARTS.get(name, name)
        times = sum(other.startswith(part) for other in outputs)  # of several towers, say
        outputs[f"{part} {times + 1}" if times else part] = output
    for part in parts:
        model.pop(part)
    return outputs


def _language_model(model: LanguageModel, reference: LanguageModel) -> Iterator[Error]:
    """The worst error of any one decoder layer, and that of the logits, for random ids.

    A layer's own error is what it adds to the source's activations, so it does not depend on the
    layers before.
    """
    key, vocabulary = mx.random.key(0), reference.config.vocab_size
    ids = mx.random.randint(0, vocabulary, shape=(1, TOKENS), key=key)
    for owner in (model, reference):
        _float32(owner.model.embed_tokens)
    x, wanted = (owner.embed(ids) for owner in (model, reference))
    worst = Error("decoder layers", 0.0, 0.0)
    for index in range(len(reference.model.layers)):
        for block, original in zip(model.blocks(index), reference.blocks(index), strict=True):
            layer, after = _float32(block), _float32(original)(wanted, "causal", None)
            added = layer(wanted, "causal", None) - wanted
            error = _error("decoder layers", added, after - wanted)
            worst = max(worst, error, key=lambda error: error.relative)
            x, wanted = layer(x, "causal", None), after
            mx.eval(x, wanted)
        for owner in (model, reference):
            owner.model.layers[index] = nn.Identity()
    yield worst
    for owner in (model, reference):
        owner.model.layers = []
    yield _error("logits", _float32(model)(x), _float32(reference)(wanted))


def _float32(module: nn.Module) -> nn.Module:
    module.apply(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p)
    return module


def _error(part: str, output: mx.array, expected: mx.array) -> Error:
    difference = np.abs(np.array(output - expected, dtype=np.float64))
    largest = float(difference.max())
    off = float(np.linalg.norm(difference) / np.linalg.norm(np.array(expected)))
    return Error(part, largest, off)
