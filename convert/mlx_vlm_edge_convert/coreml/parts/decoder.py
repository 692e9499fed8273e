"""The decoder part: Llama or Qwen2 -> prefill and decode in one package, and the embeddings.

It is verified by running prompts of more than one chunk and eight steps: in float32 against MLX
with the package's own weights, which finds every fault of the graph, and then as declared.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import save_file

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.cache import KVCache
from mlx_vlm_edge.language.llama import LanguageModel, TextConfig, rope_periods

from ..check import audit
from ..check.interpreter import Mode, Package
from ..emit.matrices import Groups, Matrix, as_layer, matrix, original, to_half
from ..emit.network import numpy
from ..emit.transformer import Decoder, Form, Layer
from ..names import DECODE, PREFILL
from ..package.save import save_package
from ..parity import Check, Parity, distance
from ..part import Function, Options
from ..run.host import EMBEDDINGS_FILE, EMBEDDINGS_NAME, DecoderHost, Geometry

CHUNK = 64  # positions of prefill
STEPS = 8  # decode steps that are verified
# Relative error of logits in float32, of DEPTH layers and in proportion beyond: the rounding of two
# ways of computing 24 layers gave 1.1e-5.
GRAPH, DEPTH = 1e-5, 8
# As declared; states are float16 in a float32 package as well.
LIMITS = {"fp32": 1e-2, "fp16": 2e-2, "mixed": 2e-2}
TABLE = 5e-4  # of the embeddings: float16's half step
ROWS = 16384  # embeddings that are read at a time
# Of weights against MLX's own: rounding to float16; and what 16 values leave of normal weights.
WEIGHTS, PALETTE = 1e-3, 0.25
QKV = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class DecoderPart:
    """prefill takes `chunk` positions, decode one; the context is a multiple of the chunk."""

    language_model: Any
    options: Options
    chunk: int = CHUNK
    name: str = "decoder"
    minimum: str = "iOS18"

    def __post_init__(self) -> None:
        if type(self.language_model) is not LanguageModel:
            raise UsageError(
                "the decoder export covers Llama and Qwen2, not this family's language model: "
                "use --part vision"
            )
        context, most = self.options.context, self._config.max_position_embeddings
        if not 0 < context <= most:
            raise UsageError(f"--context {context}: this model's is 1 to {most:,}")
        if context % self.chunk:
            best = max(self.chunk, context // self.chunk * self.chunk)
            raise UsageError(
                f"--context {context} is no multiple of {self.chunk}, the positions of a prefill "
                f"chunk: use {best}"
            )

    @property
    def _config(self) -> TextConfig:
        config: TextConfig = self.language_model.config
        return config

    @property
    def _half(self) -> bool:
        return self.options.precision != "fp32"

    @property
    def _form(self) -> Form:
        return "stateful" if self.options.compute == "cpu-gpu" else "readonly"

    @property
    def _head(self) -> nn.Module:
        tied = self._config.tie_word_embeddings
        return self.language_model.model.embed_tokens if tied else self.language_model.lm_head

    @cached_property
    def decoder(self) -> Decoder:
        """What is emitted."""
        model = self.language_model.model
        return Decoder(
            config=self._config,
            layers=[self._layer(layer) for layer in model.layers],
            norm=self._vector(model.norm.weight),
            head=self._matrix(self._head),
            context=self.options.context,
            half=self._half,
            form=self._form,
        )

    def _layer(self, layer: nn.Module) -> Layer:
        norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        return Layer(
            qkv=[self._matrix(each) for each in _either(layer.self_attn, *QKV)],
            out=self._matrix(layer.self_attn.o_proj),
            gate_up=[self._matrix(each) for each in _either(layer.mlp, *GATE_UP)],
            down=self._matrix(layer.mlp.down_proj),
            norms=(self._vector(norms[0]), self._vector(norms[1])),
        )

    def _matrix(self, layer: nn.Module) -> Matrix:
        return matrix(layer, self.options.bits, self._half)

    def _linears(self) -> list[nn.Module]:
        """MLX's linear layers, in `_matrices`' order."""
        linears: list[nn.Module] = []
        for layer in self.language_model.model.layers:
            linears += [*_either(layer.self_attn, *QKV), layer.self_attn.o_proj]
            linears += [*_either(layer.mlp, *GATE_UP), layer.mlp.down_proj]
        return [*linears, self._head]

    def weights_error(self) -> float:
        """The largest relative error of a matrix that is exported, against MLX's own."""
        pairs = zip(self._linears(), _matrices(self.decoder), strict=True)
        return max(
            distance(matrix.weight.dense(), original(layer, self.options.bits))
            for layer, matrix in pairs
        )

    def _vector(self, array: mx.array) -> np.ndarray:
        return to_half(numpy(array)) if self._half else numpy(array)

    @cached_property
    def geometry(self) -> Geometry:
        """What the host must know."""
        config, periods = self._config, rope_periods(self._config)
        if periods is None:
            pairs = np.arange(0, config.head_dim, 2) / config.head_dim
            listed = (config.rope_theta**pairs).tolist()
        else:
            listed = numpy(periods).tolist()
        return Geometry(
            form=self._form,
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            context=self.options.context,
            chunk=self.chunk,
            periods=listed,
            dtype="float16" if self._half else "float32",
        )

    @cached_property
    def table(self) -> np.ndarray:
        """Input embeddings [V, D] of every token."""
        size, embed = self._config.vocab_size, self.language_model.embed
        parts = [mx.arange(first, min(first + ROWS, size)) for first in range(0, size, ROWS)]
        return np.concatenate([numpy(embed(ids)).astype(self.geometry.dtype) for ids in parts])

    @property
    def _graph_limit(self) -> float:
        return GRAPH * max(1.0, self._config.num_hidden_layers / DEPTH)

    @property
    def _weights_limit(self) -> float:
        return PALETTE if self.options.bits == "palette4" else WEIGHTS

    def functions(self) -> Sequence[Function]:
        """`prefill` and `decode`, of the same weights."""
        return (
            Function(PREFILL, lambda: self.decoder.program(self.chunk)),
            Function(DECODE, lambda: self.decoder.program(1)),
        )

    def write_files(self, folder: Path) -> None:
        """The embeddings, which are looked up outside of the package."""
        try:
            save_file({EMBEDDINGS_NAME: self.table}, folder / EMBEDDINGS_FILE)
        except OSError as error:
            raise UsageError(f"{EMBEDDINGS_FILE}: cannot be written ({error})") from error

    def describe(self) -> dict[str, Any]:
        """Geometry, embeddings and compression."""
        weights = [matrix.weight for matrix in _matrices(self.decoder)]
        return {
            "geometry": asdict(self.geometry),
            "embeddings": {
                "file": EMBEDDINGS_FILE, "name": EMBEDDINGS_NAME, "dtype": self.geometry.dtype,
                "shape": list(self.table.shape),
            },
            "weights": sorted({w.kind for w in weights}),
            "matrices_with_float_offsets": sum(
                isinstance(w, Groups) and not w.whole for w in weights
            ),
        }  # fmt: skip

    def verified(self, path: Path) -> tuple["DecoderPart", Check]:
        """Save it, run it and compare it with MLX: itself, and how it did."""
        save_package(self, path)
        return self, self.check(path)

    def check(self, path: Path) -> Check:
        """Prefill and decode of a saved package against MLX.

        Raises UsageError when activations leave float16.
        """
        case = _Case(self)
        graph, wide = case.run(path, "fp32")
        parity = [
            Parity(self.name, "the embeddings", case.table_error(), TABLE),
            Parity(self.name, "the weights", self.weights_error(), self._weights_limit),
            Parity(self.name, f"prefill + {STEPS} steps (graph)", graph, self._graph_limit),
        ]
        if not self._half and self._form == "readonly":
            return Check(tuple(parity), wide)
        error, ranges = case.run(path, "declared")
        if leaving := [name for name, x in ranges.items() if not np.isfinite(x)]:
            raise UsageError(
                f"{self.name}: {len(leaving)} operations leave float16 (the first is "
                f"{leaving[0]}, which reaches {wide[leaving[0]]:.3g}): use --precision fp32"
            )
        limit = LIMITS[self.options.precision]
        parity.append(Parity(self.name, f"prefill + {STEPS} steps", error, limit))
        return Check(tuple(parity), wide if audit.leaving(ranges) else ranges)


def _either(module: nn.Module, fused: str, names: Sequence[str]) -> list[nn.Module]:
    """The layer that stands for several, or they."""
    return [module[fused]] if fused in module else [module[name] for name in names]


def _matrices(decoder: Decoder) -> list[Matrix]:
    """All of them, in `_linears`' order."""
    matrices: list[Matrix] = []
    for layer in decoder.layers:
        matrices += [*layer.qkv, layer.out, *layer.gate_up, layer.down]
    return [*matrices, decoder.head]


class _Case:
    """A prompt of random tokens, a chunk and a padded part of one, and what MLX makes of it."""

    def __init__(self, part: DecoderPart) -> None:
        self.part = part
        length = min(part.chunk + part.chunk // 2 + 1, part.options.context - STEPS)
        self._ids = np.random.default_rng(0).integers(0, part.table.shape[0], max(length, 1))
        self.steps = min(STEPS, part.options.context - len(self._ids))

    def table_error(self) -> float:
        """Of the embeddings of the prompt, against MLX's own."""
        own = numpy(self.part.language_model.embed(mx.array(self._ids)))
        return distance(self.part.table[self._ids], own)

    @cached_property
    def _reference(self) -> tuple[np.ndarray, list[int]]:
        """Logits [1 + steps, V] of the last position and of greedy steps, and their tokens."""
        model, cache = reference(self.part), [KVCache() for _ in self.part.decoder.layers]
        table, logits, tokens = self.part.table, [], []
        x = table[self._ids]
        for _ in range(self.steps + 1):
            out = model(mx.array(x.astype(np.float32))[None], cache, last_only=True)
            logits.append(np.array(out[0, -1]))
            tokens.append(int(logits[-1].argmax()))
            x = table[tokens[-1:]]
        return np.stack(logits), tokens

    def run(self, path: Path, mode: Mode) -> tuple[float, dict[str, float]]:
        """The logits' error, infinite where another token leads in float32; and the ranges."""
        package = Package(path, mode, track=True)
        host = DecoderHost(package, replace(self.part.geometry, dtype="float32"), self.part.table)
        expected, tokens = self._reference
        steps = [host.prefill(host.embed(self._ids.tolist()))]
        steps += [host.step(token) for token in tokens[:-1]]
        logits = np.stack(steps)
        if mode == "fp32" and logits.argmax(-1).tolist() != tokens:
            return float("inf"), package.ranges
        return distance(logits, expected), package.ranges


def reference(part: DecoderPart) -> LanguageModel:
    """MLX's decoder in float32, with the numbers that the package holds: weights and constants."""
    decoder, config = part.decoder, part.decoder.config
    scale, root = config.head_dim**-0.5, config.rms_norm_eps**0.5
    if decoder.half:
        config = replace(config, rms_norm_eps=float(np.float16(root)) ** 2)
    model = LanguageModel(replace(config, tie_word_embeddings=False))
    model.lm_head = as_layer(decoder.head)
    model.model.norm.weight = mx.array(decoder.norm)
    # Queries are scaled by a constant of the package's dtype.
    heads, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads
    factor = np.ones(heads + kv * config.head_dim, np.float32)
    factor[:heads] = float(np.float16(scale)) / scale if decoder.half else 1
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
