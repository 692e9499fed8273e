"""A saved decoder against MLX: embeddings, every matrix and vector, and the logits of a prompt.

A padded pass of every prefill and eight steps are run: in float32 against MLX with the package's
own numbers, which finds every fault of the graph; then as declared; and that against the model as
it was loaded, which finds numbers that are in their right form and not the model's.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.llama import LanguageModel

from ..check import audit
from ..check.interpreter import Mode, Package
from ..emit.matrices import Groups, original
from ..emit.network import numpy
from ..emit.palettes import PALETTES
from ..parity import Check, Parity, distance
from ..run.host import DecoderHost
from .decoder_reference import (
    Exported,
    as_loaded,
    logits_of,
    matrices_of,
    pairs,
    reference,
)

STEPS = 8  # decode steps that are verified
# Relative error of logits in float32, of DEPTH layers and in proportion beyond: the rounding of two
# ways of computing 24 layers gave 1.1e-5.
GRAPH, DEPTH = 1e-5, 8
# As declared; states are float16 in a float32 package as well.
LIMITS = {"fp32": 1e-2, "fp16": 2e-2, "mixed": 2e-2}
TABLE = 5e-4  # of the embeddings: float16's half step
# Of weights against MLX's own: rounding to float16; what it takes to restore offsets that half
# precision had rounded, a twentieth of the quantisation's own error; what 16 values leave of normal
# weights.
WEIGHTS, RESTORED, PALETTE = 1e-3, 1e-2, 0.25


def check(part: Exported, path: Path) -> Check:
    """How a saved package compares. Raises UsageError when activations leave float16."""
    prompt, limit = _Prompt(part), LIMITS[part.options.precision]
    loaded, weights = prompt.as_loaded()
    steps = f"prefill + {STEPS} steps"
    parity = [
        Parity(part.name, "the embeddings", prompt.table_error(), TABLE),
        Parity(part.name, "the weights", weights, _weights_limit(part)),
        Parity(part.name, "norms and biases", vectors_error(part), WEIGHTS),
    ]
    expected = prompt.reference
    part.forget()
    graph, wide = prompt.run(path, "fp32")
    parity.append(Parity(part.name, f"{steps} (graph)", distance(graph, expected), _graph(part)))
    logits, ranges = graph, wide
    if part.options.precision != "fp32" or part.form == "stateful":
        logits, ranges = prompt.run(path, "declared")
        if leaving := [name for name, x in ranges.items() if not np.isfinite(x)]:
            raise UsageError(
                f"{part.name}: {len(leaving)} operations leave float16 (the first is "
                f"{leaving[0]}, which reaches {wide[leaving[0]]:.3g}): use --precision fp32"
            )
        parity.append(Parity(part.name, steps, distance(logits, expected), limit))
    apart = distance(logits, loaded)
    parity.append(Parity(part.name, f"{steps}, the model as it was loaded", apart, limit))
    trial = prompt.trial(logits)
    return Check(tuple(parity), wide if audit.leaving(ranges) else ranges, trial)


def check_context(part: Exported, path: Path) -> list[Parity]:
    """How the functions of a further context compare with MLX, in float32 and as declared; the
    numbers of the package are those that `check` compared."""
    prompt, what = _Prompt(part), f"context {part.options.context}, prefill + {STEPS} steps"
    modes: dict[Mode, tuple[str, float]] = {
        "fp32": (" (graph)", _graph(part)), "declared": ("", LIMITS[part.options.precision])
    }  # fmt: skip
    return [
        Parity(part.name, what + note, distance(prompt.run(path, mode)[0], prompt.reference), limit)
        for mode, (note, limit) in modes.items()
    ]


def vectors_error(part: Exported) -> float:
    """The largest relative error of a norm or bias that is exported, against the model's own."""
    return max(distance(exported, numpy(own)) for exported, own in _vectors(part))


def _vectors(part: Exported) -> Iterator[tuple[np.ndarray | None, mx.array]]:
    """Each as it is exported, and the model's."""
    model = part.language_model.model
    yield part.decoder.norm, model.norm.weight
    for exported, own in zip(part.decoder.layers, model.layers, strict=True):
        yield exported.norms[0], own.input_layernorm.weight
        yield exported.norms[1], own.post_attention_layernorm.weight
    for layer, matrix in pairs(part):
        if "bias" in layer:
            yield matrix.bias, layer.bias


def _weights_limit(part: Exported) -> float:
    if part.options.bits in PALETTES:
        return PALETTE
    return RESTORED if _restored(part) else WEIGHTS


def _restored(part: Exported) -> bool:
    weights = (matrix.weight for matrix in matrices_of(part.decoder))
    return any(isinstance(weight, Groups) and weight.moved for weight in weights)


def _graph(part: Exported) -> float:
    return GRAPH * max(1.0, len(part.decoder.layers) / DEPTH)


class _Prompt:
    """Random tokens: a padded pass for every prefill and, behind what is cached, the smallest; then
    some one by one; and what MLX makes of them."""

    def __init__(self, part: Exported) -> None:
        self.part = part
        sizes = sorted(part.geometry.chunks.values(), reverse=True)
        ends = np.cumsum([size // 2 + 1 for size in (*sizes, part.chunk)])
        length = max(min(int(ends[-1]), part.options.context - STEPS), 1)
        whole = min(length + STEPS, part.options.context)
        self._ids = np.random.default_rng(0).integers(0, part.table.shape[0], whole)
        passes = [ids for ids in np.split(self._ids[:length], ends[:-1]) if len(ids)]
        self.passes, self._steps = passes, self._ids[length:]
        self._ends = np.cumsum([*map(len, passes), *[1] * len(self._steps)]) - 1

    @cached_property
    def _embedded(self) -> np.ndarray:
        """By the model's own table, compressed by MLX where the exported one is."""
        model, ids = self.part.language_model, mx.array(self._ids)
        if bits := self.part.options.embedding_bits:
            return original(model.model.embed_tokens, bits, ids)
        return numpy(model.embed(ids))

    def table_error(self) -> float:
        """Of the embeddings of the prompt, against MLX's own."""
        return distance(self.part.table[self._ids], self._embedded)

    @cached_property
    def reference(self) -> np.ndarray:
        """Logits [passes + steps, tokens] of the last positions, by `decoder_reference`."""
        return self._logits(reference(self.part), self.part.table[self._ids])

    def as_loaded(self) -> tuple[np.ndarray, float]:
        """The same by the loaded model; and the largest error of a matrix that is exported."""
        model, products = as_loaded(self.part)
        return self._logits(model, self._embedded), max(product.error for product in products)

    def _logits(self, model: LanguageModel, embedded: np.ndarray) -> np.ndarray:
        return logits_of(model, embedded, self._ends, self.part.decoder.tokens)

    def trial(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """The first pass and the token that led in a package's own logits after it."""
        ids, token = self.passes[0], logits[0].argmax()
        return {"ids": ids.astype(np.int32), "token": np.array([token], np.int32)}

    def run(self, path: Path, mode: Mode) -> tuple[np.ndarray, dict[str, float]]:
        """A package's logits, NaN where another token leads in float32 or the package says that
        another one leads; and its ranges."""
        package = Package(path, mode, track=True)
        host = DecoderHost(package, replace(self.part.geometry, dtype="float32"), self.part.table)
        logits, said = [], []
        for ids in self.passes:
            logits.append(host.prefill(host.embed(ids.tolist())))
            said.append(host.token)
        for token in self._steps.tolist():
            logits.append(host.step(token))
            said.append(host.token)
        whole = np.stack(logits)
        leading = whole.argmax(-1)
        wrong = said[0] is not None and said != leading.tolist()
        if wrong or (mode == "fp32" and (leading != self.reference.argmax(-1)).any()):
            whole = np.full_like(whole, np.nan)
        return whole, package.ranges
