"""A decoder part's tokens -> logits by MLX: of the package's own numbers, and of the loaded model.

Matrices are decoded when they are multiplied with, some rows at a time, and let go. (Without a GPU
MLX's product with packed weights is fifty times slower than decoding them.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.language.llama import LanguageModel, TextConfig

from ..emit.matrices import Matrix, original
from ..emit.palettes import PALETTES
from ..emit.transformer import Decoder, Form
from ..parity import Distance
from ..part import Options
from ..run.host import Geometry

ROWS = 16384  # of a matrix that are decoded at a time
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
    @property
    def forget(self) -> Callable[[], None]: ...


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


def pairs(part: Exported) -> Iterator[tuple[nn.Module, Matrix]]:
    """Every linear layer of MLX's, and what is exported of it."""
    return zip(linears_of(part.language_model), matrices_of(part.decoder), strict=True)


class Product(nn.Module):
    """x W^T + b of the matrix that a package holds. factor: of its outputs."""

    def __init__(self, matrix: Matrix, factor: np.ndarray | None = None) -> None:
        super().__init__()
        self._matrix, self._factor = matrix, factor

    def __call__(self, x: mx.array) -> mx.array:
        done = []
        for weight in self.weights():
            done.append(x @ weight.T)
            mx.eval(done[-1])  # and the weight is let go
        y = mx.concatenate(done, axis=-1)
        bias = self.bias()
        y = y if bias is None else y + bias
        return y if self._factor is None else y * mx.array(self._factor)

    def weights(self) -> Iterator[mx.array]:
        """float32, some rows after the others."""
        return (mx.array(part.weight.dense()) for _, part in self.exported())

    def bias(self) -> mx.array | None:
        """float32."""
        return None if self._matrix.bias is None else mx.array(self._matrix.bias)

    def exported(self) -> Iterator[tuple[slice, Matrix]]:
        """Some rows after the others."""
        for start in range(0, self._matrix.outputs, ROWS):
            stop = min(start + ROWS, self._matrix.outputs)
            yield slice(start, stop), self._matrix.rows(start, stop)


class LoadedProduct(Product):
    """The same of the model's own layer, compressed as was asked for: by MLX itself, or by the
    palettes that the package has, of which MLX has no form.

    error: of the exported matrix, from the last time that the weights were gone through.
    """

    def __init__(self, layer: nn.Module, matrix: Matrix, options: Options) -> None:
        super().__init__(matrix)
        self._layer, self._bits = layer, options.bits
        self.error = float("inf")

    def weights(self) -> Iterator[mx.array]:
        """float32, some rows after the others; each is compared with what is exported."""
        apart = Distance()
        for rows, part in self.exported():
            dense, own = part.weight.dense(), original(self._layer, self._bits, rows)
            apart.add(dense, own)
            yield mx.array(dense if self._bits in PALETTES else own)
        self.error = apart.value

    def bias(self) -> mx.array | None:
        """The model's, float32."""
        return self._layer.bias.astype(mx.float32) if "bias" in self._layer else None


def reference(part: Exported) -> LanguageModel:
    """MLX's decoder in float32, with the numbers that the package holds: weights and constants."""
    decoder, config = part.decoder, part.decoder.config
    scale, root = config.head_dim**-0.5, config.rms_norm_eps**0.5
    if decoder.half:
        config = replace(config, rms_norm_eps=float(np.float16(root)) ** 2)
    # Without fused attention, queries are scaled by a constant of the package's dtype.
    heads, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads
    factor = np.ones(heads + kv * config.head_dim, np.float32)
    scaled = decoder.half and decoder.form == "readonly"
    factor[:heads] = float(np.float16(scale)) / scale if scaled else 1
    products: list[Product] = []
    for layer in decoder.layers:
        ends = np.cumsum([matrix.outputs for matrix in layer.qkv])[:-1]
        products += map(Product, layer.qkv, np.split(factor, ends))
        products += map(Product, (layer.out, *layer.gate_up, layer.down))
    norms = [*(norm for layer in decoder.layers for norm in layer.norms), decoder.norm]
    return _assembled(decoder, config, [*products, Product(decoder.head)], [*map(mx.array, norms)])


def as_loaded(part: Exported) -> tuple[LanguageModel, list[LoadedProduct]]:
    """The loaded model in float32, its matrices compressed as was asked for, and its products."""
    own, products = part.language_model.model, loaded_products(part)
    norms = [
        norm.weight
        for layer in own.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    wide = [norm.astype(mx.float32) for norm in (*norms, own.norm.weight)]
    return _assembled(part.decoder, part.decoder.config, products, wide), products


def loaded_products(part: Exported) -> list[LoadedProduct]:
    """In `linears_of`'s order."""
    return [LoadedProduct(layer, matrix, part.options) for layer, matrix in pairs(part)]


def _assembled(
    decoder: Decoder, config: TextConfig, products: Sequence[Product], norms: Sequence[mx.array]
) -> LanguageModel:
    """A decoder of products in `linears_of`'s order, and of norms: each layer's two, the last."""
    model = LanguageModel(replace(config, tie_word_embeddings=False))
    product, norm = iter(products), iter(norms)
    for block, layer in zip(model.model.layers, decoder.layers, strict=True):
        block.input_layernorm.weight, block.post_attention_layernorm.weight = next(norm), next(norm)
        _place(block.self_attn, [next(product) for _ in layer.qkv], *QKV)
        block.self_attn.o_proj = next(product)
        _place(block.mlp, [next(product) for _ in layer.gate_up], *GATE_UP)
        block.mlp.down_proj = next(product)
    model.model.norm.weight, model.lm_head = next(norm), next(product)
    return model


def _place(
    module: nn.Module, products: Sequence[Product], fused: str, names: Sequence[str]
) -> None:
    """Layers under their names, or the one that stands for all of them."""
    if len(products) == 1:
        for name in names:
            del module[name]
        module[fused] = products[0]
        return
    for name, product in zip(names, products, strict=True):
        module[name] = product


def logits_of(
    model: LanguageModel, embeddings: np.ndarray, ends: np.ndarray, tokens: int
) -> np.ndarray:
    """Logits float32 [ends, tokens] of some positions of input embeddings [L, D]."""
    x = mx.array(embeddings.astype(np.float32))[None]
    for block in model.model.layers:
        x = block(x, "causal", None)
    return np.array(model.head(x[:, mx.array(ends)])[0, :, :tokens])
