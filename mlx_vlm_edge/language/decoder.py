"""What every decoder does the same way: input embeddings [B, L, D] -> layers, norm, head -> logits.

A layer is called with (x [B, L, D], mask, its cache or None, last_only), and `fuse` merges its
projections. With `last_only` all positions enter the cache, and one comes out: nothing that is for
the others alone is computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..kernels import tall_matmul
from ..timings import Steps
from .cache import Cache, KVCache, Mask, settle

Layer = Callable[..., mx.array]
PREFILL_STEP = 2048  # positions of a prompt that are computed together, as in mlx-lm


def chunks(length: int, step_size: int) -> Iterator[slice]:
    """The parts that a prompt goes through a model in: chunks(5, 2) -> 0:2, 2:4, 4:5."""
    return (slice(at, min(at + step_size, length)) for at in range(0, length, step_size))


def nothing(part: slice) -> Mapping[str, Any]:
    return {}


def prefill(
    language_model: "LanguageModel",
    embeddings: mx.array,
    cache: Sequence[Cache],
    step_size: int,
    beside: Callable[[slice], Mapping[str, Any]] = nothing,
) -> Steps[mx.array]:
    """Input embeddings [1, L, D] into `cache`, at most `step_size` positions at a time; logits
    [1, V] of the last one.

    beside: what else the language model is told of a part's positions, by its keywords. Where a
    part would be computed otherwise than within the whole (`splits`), there is one part.
    """
    length = embeddings.shape[1]
    for part in chunks(length, step_size if language_model.splits(length) else length):
        if part.start:
            settle(cache)
        logits = language_model(embeddings[:, part], cache, last_only=True, **beside(part))
        yield "prefill", logits
    return logits[:, -1]


class DecoderConfig(Protocol):
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def head_dim(self) -> int: ...


class Block(nn.Module):
    """A layer: `self_attn`, then `mlp`, each after its norm and added to what came in."""

    def __call__(
        self, x: mx.array, mask: Mask, cache: Cache | None, last_only: bool = False
    ) -> mx.array:
        mixed = self.self_attn(self.input_layernorm(x), mask, cache, last_only)
        x = (x[:, -1:] if last_only else x) + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig, layers: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = norm


class LanguageModel(nn.Module):
    """`model` and, when the head is not tied to the embeddings, `lm_head`."""

    def __init__(self, config: DecoderConfig, layers: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, layers, norm)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def fuse(self, then: Callable[[nn.Module], None] | None = None) -> None:
        """Merge projections layer by layer, so that no more than one layer is held twice.

        then: what else is done to a layer before the next one is read.
        """
        for layer in self.model.layers:
            layer.fuse()
            if then is not None:
                then(layer)
            mx.eval(layer.parameters())

    def blocks(self, index: int) -> list[nn.Module]:
        """What a layer has that takes x, mask and cache by itself; to compare models by layers."""
        return [self.model.layers[index]]

    def make_cache(self) -> list[Cache]:
        """One empty cache per layer."""
        return [KVCache() for _ in self.model.layers]

    def splits(self, length: int) -> bool:
        """Whether a prompt of so many positions comes out in parts as it does whole."""
        return True

    def embed(self, ids: mx.array) -> mx.array:
        """Token ids [B, L] -> input embeddings [B, L, D]."""
        return self.model.embed_tokens(ids)

    def __call__(
        self, embeddings: mx.array, cache: Sequence[Cache] | None = None, last_only: bool = False
    ) -> mx.array:
        """Logits [B, L, V] of input embeddings [B, L, D], or [B, 1, V] with `last_only`."""
        return self.run(self.model.layers, embeddings, cache, last_only)

    def run(
        self,
        layers: Sequence[Layer],
        embeddings: mx.array,
        cache: Sequence[Cache] | None,
        last_only: bool,
    ) -> mx.array:
        """Logits of input embeddings that go through these layers, each with its cache."""
        x, L = embeddings, embeddings.shape[1]
        mask = cache[0].make_mask(L) if cache else ("causal" if L > 1 else None)
        final = len(layers) - 1
        for index, layer in enumerate(layers):
            x = layer(x, mask, cache[index] if cache else None, last_only and index == final)
        return self.head(x)

    def head(self, x: mx.array) -> mx.array:
        """Logits [B, L, V] of the last layer's output [B, L, D]."""
        x = self.model.norm(x)
        tied = self.config.tie_word_embeddings
        matrix = self.model.embed_tokens if tied else self.lm_head
        if type(matrix) in (nn.Embedding, nn.Linear):
            return tall_matmul(x, matrix.weight)
        return matrix.as_linear(x) if tied else matrix(x)
