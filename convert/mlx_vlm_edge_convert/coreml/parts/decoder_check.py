"""A saved decoder against MLX: embeddings, every matrix and vector, and the logits of a prompt.

A padded pass of every prefill and eight steps are run: in float32 against MLX with the package's
own numbers, which finds every fault of the graph; then as declared; and that against the model as
it was loaded, which finds numbers that are in their right form and not the model's.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.cache import KVCache
from mlx_vlm_edge.language.llama import LanguageModel

from ..check import audit
from ..check.interpreter import Mode, Package
from ..emit.matrices import Groups, Matrix, as_layer, group_size, original
from ..emit.network import numpy
from ..emit.transformer import Decoder, Form
from ..parity import Check, Parity, distance
from ..part import Bits, Options
from ..run.host import DecoderHost, Geometry

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
QKV = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))


class Exported(Protocol):
    """What of a decoder part is compared: the model, what is emitted of it, and for which host."""

    @property
    def name(self) -> str: ...
    @property
    def language_model(self) -> Any: ...
    @property
    def options(self) -> Options: ...
    @property
    def chunk(self) -> int: ...
    @property
    def form(self) -> Form: ...
    @property
    def decoder(self) -> Decoder: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def table(self) -> np.ndarray: ...


def check(part: Exported, path: Path) -> Check:
    """How a saved package compares. Raises UsageError when activations leave float16."""
    prompt, limit = _Prompt(part), LIMITS[part.options.precision]
    graph, wide = prompt.run(path, "fp32")
    steps = f"prefill + {STEPS} steps"
    parity = [
        Parity(part.name, "the embeddings", prompt.table_error(), TABLE),
        Parity(part.name, "the weights", weights_error(part), _weights_limit(part)),
        Parity(part.name, "norms and biases", vectors_error(part), WEIGHTS),
        Parity(part.name, f"{steps} (graph)", distance(graph, prompt.reference), _graph(part)),
    ]
    logits, ranges = graph, wide
    if part.options.precision != "fp32" or part.form == "stateful":
        logits, ranges = prompt.run(path, "declared")
        if leaving := [name for name, x in ranges.items() if not np.isfinite(x)]:
            raise UsageError(
                f"{part.name}: {len(leaving)} operations leave float16 (the first is "
                f"{leaving[0]}, which reaches {wide[leaving[0]]:.3g}): use --precision fp32"
            )
        parity.append(Parity(part.name, steps, distance(logits, prompt.reference), limit))
    loaded = distance(logits, prompt.as_loaded())
    parity.append(Parity(part.name, f"{steps}, the model as it was loaded", loaded, limit))
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


def weights_error(part: Exported) -> float:
    """The largest relative error of a matrix that is exported, against MLX's own."""
    return max(
        distance(matrix.weight.dense(), original(layer, part.options.bits))
        for layer, matrix in _pairs(part)
    )


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
    for layer, matrix in _pairs(part):
        if "bias" in layer:
            yield matrix.bias, layer.bias


def _weights_limit(part: Exported) -> float:
    if part.options.bits == "palette4":
        return PALETTE
    return RESTORED if _restored(part) else WEIGHTS


def _restored(part: Exported) -> bool:
    weights = (matrix.weight for matrix in matrices_of(part.decoder))
    return any(isinstance(weight, Groups) and weight.moved for weight in weights)


def _graph(part: Exported) -> float:
    return GRAPH * max(1.0, len(part.decoder.layers) / DEPTH)


def either(module: nn.Module, fused: str, names: Sequence[str]) -> list[nn.Module]:
    """The layer that stands for several, or they."""
    return [module[fused]] if fused in module else [module[name] for name in names]


def head_of(model: LanguageModel) -> nn.Module:
    """The layer that gives logits: the embeddings, where they are tied."""
    tied = model.config.tie_word_embeddings
    head: nn.Module = model.model.embed_tokens if tied else model.lm_head
    return head


def linears_of(model: LanguageModel) -> list[nn.Module]:
    """MLX's linear layers, in `matrices_of`'s order."""
    linears: list[nn.Module] = []
    for layer in model.model.layers:
        linears += [*either(layer.self_attn, *QKV), layer.self_attn.o_proj]
        linears += [*either(layer.mlp, *GATE_UP), layer.mlp.down_proj]
    return [*linears, head_of(model)]


def matrices_of(decoder: Decoder) -> list[Matrix]:
    """All that are exported, in `linears_of`'s order."""
    matrices: list[Matrix] = []
    for layer in decoder.layers:
        matrices += [*layer.qkv, layer.out, *layer.gate_up, layer.down]
    return [*matrices, decoder.head]


def _pairs(part: Exported) -> Iterator[tuple[nn.Module, Matrix]]:
    return zip(linears_of(part.language_model), matrices_of(part.decoder), strict=True)


class _Prompt:
    """A prompt of random tokens, of a padded pass for every prefill and, behind what is cached, the
    smallest; and what MLX makes of it."""

    def __init__(self, part: Exported) -> None:
        self.part = part
        sizes = sorted(part.geometry.chunks.values(), reverse=True)
        ends = np.cumsum([size // 2 + 1 for size in (*sizes, part.chunk)])
        length = max(min(int(ends[-1]), part.options.context - STEPS), 1)
        self._ids = np.random.default_rng(0).integers(0, part.table.shape[0], length)
        self.passes = [ids for ids in np.split(self._ids, ends[:-1]) if len(ids)]
        self.steps = min(STEPS, part.options.context - length)

    def _embedded(self, ids: np.ndarray) -> np.ndarray:
        """By the model's own table, compressed by MLX where the exported one is."""
        if bits := self.part.options.embedding_bits:
            return original(self.part.language_model.model.embed_tokens, bits)[ids]
        return numpy(self.part.language_model.embed(mx.array(ids)))

    def table_error(self) -> float:
        """Of the embeddings of the prompt, against MLX's own."""
        return distance(self.part.table[self._ids], self._embedded(self._ids))

    @property
    def reference(self) -> np.ndarray:
        """Logits [passes + steps, V] of each last position, by `reference`."""
        return self._greedy[0]

    @cached_property
    def _greedy(self) -> tuple[np.ndarray, list[int]]:
        """The reference's logits, and the tokens that lead in them."""
        model, cache = reference(self.part), [KVCache() for _ in self.part.decoder.layers]
        table, logits = self.part.table, []
        tokens: list[int] = []
        for number in range(len(self.passes) + self.steps):
            ids = self.passes[number] if number < len(self.passes) else tokens[-1:]
            x = table[np.asarray(ids)].astype(np.float32)
            out = model(mx.array(x)[None], cache, last_only=True)
            logits.append(np.array(out[0, -1]))
            tokens.append(int(logits[-1].argmax()))
        return np.stack(logits), tokens

    def trial(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """The first pass and the token that led in a package's own logits after it."""
        ids, token = self.passes[0], logits[0].argmax()
        return {"ids": ids.astype(np.int32), "token": np.array([token], np.int32)}

    def as_loaded(self) -> np.ndarray:
        """Logits [passes + steps, V] of the same positions by the loaded model, in one pass."""
        stepped = self._greedy[1][len(self.passes) - 1 : -1]
        ids = np.concatenate([self._ids, stepped]).astype(np.int64)
        logits = as_loaded(self.part)(mx.array(self._embedded(ids))[None])
        ends = np.cumsum([*map(len, self.passes), *[1] * self.steps]) - 1
        return np.array(logits[0])[ends]

    def run(self, path: Path, mode: Mode) -> tuple[np.ndarray, dict[str, float]]:
        """A package's logits, NaN where another token leads in float32 or the package says that
        another one leads; and its ranges."""
        package = Package(path, mode, track=True)
        host = DecoderHost(package, replace(self.part.geometry, dtype="float32"), self.part.table)
        tokens, logits, said = self._greedy[1], [], []
        for number in range(len(tokens)):
            if number < len(self.passes):
                logits.append(host.prefill(host.embed(self.passes[number].tolist())))
            else:
                logits.append(host.step(tokens[number - 1]))
            said.append(host.token)
        whole = np.stack(logits)
        leading = whole.argmax(-1).tolist()
        wrong = said[0] is not None and said != leading
        if wrong or (mode == "fp32" and leading != tokens):
            whole = np.full_like(whole, np.nan)
        return whole, package.ranges


def as_loaded(part: Exported) -> LanguageModel:
    """The loaded model in float32, its matrices compressed as was asked for: by MLX itself, or
    the palettes that the package has, of which MLX has no form."""
    shared = {id(array): array for _, array in tree_flatten(part.language_model.parameters())}
    model: LanguageModel = copy.deepcopy(part.language_model, shared)
    model.apply(_float32)
    if part.options.bits == "palette4":
        for layer, matrix in zip(linears_of(model), matrices_of(part.decoder), strict=True):
            layer.weight = mx.array(matrix.weight.dense())
    elif part.options.bits is not None:
        nn.quantize(model, class_predicate=partial(_form, part.options.bits))
    return model


def _form(bits: Bits, _: str, layer: nn.Module) -> dict[str, Any] | bool:
    """How a layer is quantised, where it can be and is not yet."""
    if not hasattr(layer, "to_quantized"):
        return False
    return {"group_size": group_size(layer.weight.shape[1]), "bits": bits}


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def reference(part: Exported) -> LanguageModel:
    """MLX's decoder in float32, with the numbers that the package holds: weights and constants."""
    decoder, config = part.decoder, part.decoder.config
    scale, root = config.head_dim**-0.5, config.rms_norm_eps**0.5
    if decoder.half:
        config = replace(config, rms_norm_eps=float(np.float16(root)) ** 2)
    model = LanguageModel(replace(config, tie_word_embeddings=False))
    model.lm_head = as_layer(decoder.head)
    model.model.norm.weight = mx.array(decoder.norm)
    # Without fused attention, queries are scaled by a constant of the package's dtype.
    heads, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads
    factor = np.ones(heads + kv * config.head_dim, np.float32)
    scaled = decoder.half and decoder.form == "readonly"
    factor[:heads] = float(np.float16(scale)) / scale if scaled else 1
    for own, layer in zip(model.model.layers, decoder.layers, strict=True):
        own.input_layernorm.weight, own.post_attention_layernorm.weight = map(mx.array, layer.norms)
        _place(own.self_attn, layer.qkv, *QKV, factor)
        _place(own.mlp, layer.gate_up, *GATE_UP)
        own.self_attn.o_proj, own.mlp.down_proj = as_layer(layer.out), as_layer(layer.down)
    return model


def _place(
    module: nn.Module,
    matrices: Sequence[Matrix],
    fused: str,
    names: Sequence[str],
    factor: np.ndarray | None = None,
) -> None:
    """Layers under their names, or the one that stands for all of them; their outputs scaled."""
    sizes = [matrix.outputs for matrix in matrices]
    factors = np.ones(sum(sizes), np.float32) if factor is None else factor
    parts = np.split(factors, np.cumsum(sizes)[:-1])
    layers = [as_layer(*pair) for pair in zip(matrices, parts, strict=True)]
    if len(layers) == 1:
        for name in names:
            del module[name]
        module[fused] = layers[0]
        return
    for name, layer in zip(names, layers, strict=True):
        module[name] = layer
