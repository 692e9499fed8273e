"""The decoder part: Llama or Qwen2 -> prefill and decode in one package, and the embeddings.

How it is verified stands in decoder_check.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.llama import LanguageModel, TextConfig, rope_periods
from mlx_vlm_edge.wording import gigabytes

from ..check.lint import PROGRAM_BYTES
from ..emit.matrices import WIDTHS, Groups, Matrix, matrix, packed, to_half
from ..emit.network import numpy
from ..emit.transformer import Decoder, Form, Layer
from ..names import DECODE, context_name, prefill_name
from ..package.save import save_arrays, save_package
from ..parity import Check
from ..part import Bits, Function, Options
from ..run.host import EMBEDDINGS_FILE, EMBEDDINGS_NAME, Geometry
from .decoder_check import RESTORED, check, check_context
from .decoder_reference import GATE_UP, QKV, either, head_of, linears_of, matrices_of

CHUNK, MORE = 64, 4  # positions of the smallest prefill; how many of it are the larger one
ROWS = 16384  # embeddings that are read at a time


def refuse_groups(options: Options, quantised: bool = False) -> None:
    """Raises UsageError for weights in groups of values on the Neural Engine.

    quantised: the model's own are. On devices they gave cosines of 0.37 where palettes gave 0.9975
    (apple/coreai-models #279), or were not placed at all (#205).
    """
    if options.compute != "cpu-ne" or not (quantised or options.bits in WIDTHS):
        return
    what = f"--bits {options.bits}" if options.bits else "the model's quantised weights"
    model = "export the full-precision model with" if quantised else "use"
    raise UsageError(
        f"{what} with --compute cpu-ne: weights in groups are reported to give wrong numbers on "
        f"the Neural Engine; {model} --bits palette4, or --compute cpu-gpu"
    )


def refuse_head(options: Options) -> None:
    """Raises UsageError for a head of its own where the rest has no palettes."""
    if options.head_bits is not None and options.bits != "palette4":
        raise UsageError(
            f"--head-bits {options.head_bits} gives the output head palettes of 64 values, where "
            "the rest has 16: use it with --bits palette4"
        )


@dataclass(frozen=True)
class DecoderPart:
    """prefill takes `chunk` positions, where the context has room for them another four times as
    many, decode one; the context is a multiple of the chunk. first: whose numbers these are, where
    it is a further context of that. tokens: how many of the vocabulary's rows are some, the first
    ones; all without it. forget: called when MLX has computed all that a package is compared
    with."""

    language_model: Any
    options: Options
    chunk: int = CHUNK
    first: "DecoderPart | None" = None
    name: str = "decoder"
    minimum: str = "iOS18"
    tokens: int | None = None
    forget: Callable[[], None] = field(default=lambda: None, compare=False)

    def __post_init__(self) -> None:
        if type(self.language_model) is not LanguageModel:
            raise UsageError(
                "the decoder export covers Llama and Qwen2, not this family's language model: "
                "use --part vision"
            )
        refuse_groups(self.options, self._quantised)
        refuse_head(self.options)
        for context in (self.options.context, *self.options.more_contexts):
            self._check_context(context)

    def _check_context(self, context: int) -> None:
        most = self._config.max_position_embeddings
        if not 0 < context <= most:
            raise UsageError(f"--context {context}: this model's is 1 to {most:,}")
        if context % self.chunk:
            best = max(self.chunk, context // self.chunk * self.chunk)
            raise UsageError(
                f"--context {context} is no multiple of {self.chunk}, the positions of a prefill "
                f"chunk: use {best}"
            )

    @cached_property
    def contexts(self) -> list["DecoderPart"]:
        """Itself, and the same for further contexts."""
        alone = replace(self.options, more_contexts=())
        further = self.options.more_contexts
        return [
            self,
            *(replace(self, options=replace(alone, context=n), first=self) for n in further),
        ]

    @property
    def _config(self) -> TextConfig:
        config: TextConfig = self.language_model.config
        return config

    @property
    def _quantised(self) -> bool:
        """Whether a matrix of the model is in groups already."""
        return any("scales" in layer for layer in linears_of(self.language_model))

    @property
    def _half(self) -> bool:
        return self.options.precision != "fp32"

    @property
    def form(self) -> Form:
        """Where the cache is kept: in states, or by the host."""
        return "stateful" if self.options.compute == "cpu-gpu" else "readonly"

    @cached_property
    def decoder(self) -> Decoder:
        """What is emitted."""
        if self.first is not None:
            return replace(self.first.decoder, context=self.options.context)
        model = self.language_model.model
        return Decoder(
            config=self._config,
            layers=[self._layer(layer) for layer in model.layers],
            norm=self._vector(model.norm.weight),
            head=matrix(head_of(self.language_model), self._head_bits, self._half),
            tokens=self.tokens or self._config.vocab_size,
            context=self.options.context,
            half=self._half,
            form=self.form,
        )

    def _layer(self, layer: nn.Module) -> Layer:
        norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        return Layer(
            qkv=[self._matrix(each) for each in either(layer.self_attn, *QKV)],
            out=self._matrix(layer.self_attn.o_proj),
            gate_up=[self._matrix(each) for each in either(layer.mlp, *GATE_UP)],
            down=self._matrix(layer.mlp.down_proj),
            norms=(self._vector(norms[0]), self._vector(norms[1])),
        )

    @property
    def _head_bits(self) -> Bits | None:
        return "palette6" if self.options.head_bits == 6 else self.options.bits

    def _matrix(self, layer: nn.Module) -> Matrix:
        return matrix(layer, self.options.bits, self._half)

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
            form=self.form,
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            context=self.options.context,
            chunk=self.chunk,
            chunks={self._named(prefill_name(size, self.chunk)): size for size in self._sizes},
            periods=listed,
            dtype="float16" if self._half else "float32",
            decode=self._named(DECODE),
        )

    def _named(self, function: str) -> str:
        return function if self.first is None else context_name(function, self.options.context)

    @property
    def _sizes(self) -> list[int]:
        """Positions of the functions that take several."""
        sizes = (self.chunk, MORE * self.chunk)
        return [size for size in sizes if size <= self.options.context]

    @cached_property
    def grouped(self) -> Groups | None:
        """The embeddings in groups, where they are wanted so."""
        bits = self.options.embedding_bits
        if bits is None:
            return None
        weight = matrix(self.language_model.model.embed_tokens, bits, half=True).weight
        return weight if isinstance(weight, Groups) else None

    @cached_property
    def table(self) -> np.ndarray:
        """Input embeddings [V, D] of every token, as the host looks them up."""
        if self.first is not None:
            return self.first.table
        if self.grouped is not None:
            return self.grouped.dense().astype(self.geometry.dtype)
        size, embed = self._config.vocab_size, self.language_model.embed
        parts = [mx.arange(first, min(first + ROWS, size)) for first in range(0, size, ROWS)]
        return np.concatenate([numpy(embed(ids)).astype(self.geometry.dtype) for ids in parts])

    def functions(self) -> Sequence[Function]:
        """Every `prefill`, and `decode`, of every context, of the same weights."""
        return [
            Function(name, partial(each.decoder.program, q))
            for each in self.contexts
            for name, q in {**each.geometry.chunks, each.geometry.decode: 1}.items()
        ]

    def write_files(self, folder: Path) -> None:
        """The embeddings, which are looked up outside of the package."""
        save_arrays(self._table_arrays(), folder / EMBEDDINGS_FILE)

    def _table_arrays(self) -> dict[str, np.ndarray]:
        """Dense, or packed with scales and offsets [V, groups]: scale * (value - offset)."""
        groups = self.grouped
        if groups is None:
            return {EMBEDDINGS_NAME: self.table}
        whole = np.uint8 if groups.whole else np.float16
        return {
            EMBEDDINGS_NAME: packed(groups.data, groups.bits).view(np.uint8),
            f"{EMBEDDINGS_NAME}.scale": groups.scale.astype(np.float16),
            f"{EMBEDDINGS_NAME}.offset": groups.offset.astype(whole),
        }

    def memory(self) -> dict[str, int]:
        """Keys and values of the whole context, and the embeddings."""
        table = sum(array.nbytes for array in self._table_arrays().values())
        return {"cache": self._cache, "embeddings": table}

    @property
    def _cache(self) -> int:
        """Bytes of keys and values."""
        each = 2 if self._half or self.form == "stateful" else 4
        return 2 * math.prod(self.decoder.cache_shape) * each

    def describe(self) -> dict[str, Any]:
        """Geometry, embeddings and compression."""
        groups, geometry = self._groups(), asdict(self.geometry)
        del geometry["decode"]  # of the usual context it is `decode`
        return {
            "geometry": geometry,
            "contexts": [
                {"context": each.geometry.context, "chunks": dict(each.geometry.chunks),
                 "decode": each.geometry.decode, "cache": each._cache}
                for each in self.contexts
            ],
            "embeddings": {
                "file": EMBEDDINGS_FILE, "name": EMBEDDINGS_NAME, "dtype": self.geometry.dtype,
                "shape": list(self.table.shape), "bits": self.options.embedding_bits,
            },
            "weights": sorted({matrix.weight.kind for matrix in matrices_of(self.decoder)}),
            "matrices_with_float_offsets": sum(not weight.whole for weight in groups),
        }  # fmt: skip

    def _groups(self) -> list[Groups]:
        weights = (matrix.weight for matrix in matrices_of(self.decoder))
        return [weight for weight in weights if isinstance(weight, Groups)]

    def warnings(self) -> list[str]:
        """Of a size that devices may not load, and of offsets that are not what Core ML wants, or
        not what MLX has."""
        groups, lines = self._groups(), []
        nbytes = sum(matrix.weight.nbytes for matrix in matrices_of(self.decoder))
        if nbytes > PROGRAM_BYTES:
            lines.append(
                f"its weights are {gigabytes(nbytes)} in one program, which devices are reported "
                f"not to load beyond {gigabytes(PROGRAM_BYTES)}: use fewer bits"
            )
        if floats := sum(not weight.whole for weight in groups):
            lines.append(
                f"offsets of {floats} of {len(groups)} matrices are no integers, on which Core ML "
                "of macOS 26 is reported to abort: export the full-precision model with --bits"
            )
        if moved := sum(weight.moved for weight in groups):
            lines.append(
                f"offsets of {moved} of {len(groups)} matrices are integers again, as before "
                f"half precision rounded them: weights may be off by {RESTORED:.0e}"
            )
        return lines

    def verified(self, path: Path) -> tuple["DecoderPart", Check]:
        """Save it, run it and compare it with MLX: itself, and how it did."""
        save_package(self, path)
        found = check(self, path)
        more = [parity for each in self.contexts[1:] for parity in check_context(each, path)]
        return self, replace(found, parity=(*found.parity, *more))
