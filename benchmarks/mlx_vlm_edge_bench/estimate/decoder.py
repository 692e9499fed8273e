"""The language models: the cost of a prompt, of a token, of their weights and of their cache."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_vlm_edge.checkpoint.config import check
from mlx_vlm_edge.checkpoint.configs.defaults import LLAMA
from mlx_vlm_edge.errors import UsageError

from .work import Work

GROUP = 64  # values that share a scale and a bias when quantised at load
_BIASED = ("qwen2", "persimmon")  # whose q, k and v have biases unless the config says otherwise


@dataclass(frozen=True)
class Decoder:
    """matrices, vectors: parameters of a layer. attention: width of the queries of all heads.

    cached: values a position leaves in a layer's cache. passed: activations of a position in a
    layer. kinds: sets of layer weights (EVE v2 has a second one, for visual tokens).
    """

    layers: int
    width: int
    matrices: int
    vectors: int
    attention: int
    cached: int
    passed: int
    vocabulary: int
    final_norm: int
    tied: bool
    context: int
    kinds: int = 1

    def __post_init__(self) -> None:
        check(self, positive=True)

    @property
    def head(self) -> int:
        """Parameters of the output head, which are the embedding's where both are tied."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        layers = self.layers * self.kinds * (self.matrices + self.vectors)
        return layers + self.head * (1 if self.tied else 2) + self.final_norm

    def prefill(self, positions: int) -> Work:
        """A prompt in one pass: causal attention, logits of the last position only."""
        pairs = positions * (positions + 1) // 2
        return Work(
            macs=positions * self.layers * self.matrices + self.head,
            attention=self.layers * 2 * pairs * self.attention,
            matrices=self.layers * self.kinds * self.matrices,
            vectors=self.layers * self.kinds * self.vectors + self.final_norm + self.head,
            values=positions * self.layers * self.passed,
        )

    def step(self, position: int) -> Work:
        """One more token after `position` others; it is text, so one kind of weights is read."""
        return Work(
            macs=self.layers * self.matrices + self.head,
            attention=self.layers * 2 * (position + 1) * self.attention,
            matrices=self.layers * self.matrices,
            vectors=self.layers * self.vectors + self.final_norm + self.head,
            values=self.layers * self.passed,
        )

    def read_bytes(self, work: Work, bits: int | None, size: int) -> int:
        """Bytes of the weights that `work` (a prefill or a step) reads."""
        packed = work.matrices + self.head
        return _bytes(packed, bits, size) + (work.vectors - self.head) * size

    def weight_bytes(self, bits: int | None, size: int) -> int:
        """Bytes of all weights: matmuls and embedding in `bits` (None: unquantised, as the rest),
        norms and biases in `size` bytes each."""
        packed = self.layers * self.kinds * self.matrices + self.head * (1 if self.tied else 2)
        return _bytes(packed, bits, size) + (self.parameters - packed) * size

    def cache_bytes(self, positions: int, size: int = 2) -> int:
        return positions * self.layers * self.cached * size


def _bytes(parameters: int, bits: int | None, size: int) -> int:
    """Of a quantised matrix: its values, and a scale and a bias for each group of 64."""
    if bits is None:
        return parameters * size
    return parameters * bits // 8 + parameters // GROUP * 2 * size


def llama(text: Mapping[str, Any], kind: str, *, tied: bool, kinds: int = 1) -> Decoder:
    """A Llama's or Qwen2's, by its text config. Raises UsageError for a key that it lacks."""
    try:
        width, inner, heads = (
            text[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
        )
        layers, vocabulary = text["num_hidden_layers"], text["vocab_size"]
        head = text.get("head_dim") or width // heads
        q, kv = heads * head, (text.get("num_key_value_heads") or heads) * head
        biases = (q + 2 * kv) * text.get("attention_bias", kind in _BIASED)
        biases += width * text.get("attention_bias", False)
        biases += (2 * inner + width) * text.get("mlp_bias", False)
        return Decoder(
            layers=layers,
            width=width,
            matrices=width * (q + 2 * kv) + q * width + 3 * width * inner,
            vectors=2 * width + biases,
            attention=q,
            cached=2 * kv,
            passed=7 * width + 4 * q + 4 * kv + 3 * inner,
            vocabulary=vocabulary,
            final_norm=width,
            tied=tied,
            context=text.get("max_position_embeddings", LLAMA["max_position_embeddings"]),
            kinds=kinds,
        )
    except KeyError as error:
        raise UsageError(f"config.json lacks {error.args[0]!r}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise UsageError(f"config.json: a size of the language model is wrong ({error})") from error


def persimmon(text: Mapping[str, Any], *, tied: bool) -> Decoder:
    """Fuyu's: LayerNorms and biases everywhere, norms on q and k, two matmuls in the MLP."""
    plain = llama(text, "persimmon", tied=tied)
    width, inner = plain.width, text["intermediate_size"]
    head = width // text["num_attention_heads"]
    return replace(
        plain,
        matrices=4 * width**2 + 2 * width * inner,
        vectors=9 * width + 4 * head + inner,
        passed=13 * width + 2 * inner,
        final_norm=2 * width,
    )
