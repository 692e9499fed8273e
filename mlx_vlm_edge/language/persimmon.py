"""The Persimmon decoder of Fuyu: LayerNorms with bias, and biases on every layer but the head.

Unlike Llama: one `query_key_value` whose rows go head by head (q, k, v of head 0, then of head 1),
a LayerNorm on every head's q and k before the rotary positions, which turn a part of each head
only, and relu(x) squared between the two layers of the MLP.
Source: transformers, models/persimmon/modeling_persimmon.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import check, first
from ..errors import UsageError
from ..kernels import relu_squared
from . import decoder
from .attend import attend
from .cache import Cache, Mask


@dataclass(frozen=True)
class TextConfig:
    """Geometry of the decoder, under the checkpoint's own field names."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    layer_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        check(self, positive=True)
        if self.hidden_size % self.num_attention_heads or self.partial_rotary_factor > 1:
            raise UsageError("config.json: hidden_size or partial_rotary_factor fits no heads")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dims(self) -> int:
        """How many leading dimensions of a head the rotary positions turn."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TextConfig":
        """Read a Persimmon config. Raises UsageError for a missing key or an unknown value."""
        rope = first(config.get("rope_parameters"), {})
        _check(config, rope)
        try:
            return cls(
                hidden_size=config["hidden_size"],
                num_hidden_layers=config["num_hidden_layers"],
                intermediate_size=config["intermediate_size"],
                num_attention_heads=config["num_attention_heads"],
                vocab_size=config["vocab_size"],
                layer_norm_eps=first(config.get("layer_norm_eps"), 1e-5),
                rope_theta=first(config.get("rope_theta"), rope.get("rope_theta"), 25000.0),
                partial_rotary_factor=first(
                    config.get("partial_rotary_factor"), rope.get("partial_rotary_factor"), 0.5
                ),
                max_position_embeddings=first(config.get("max_position_embeddings"), 16384),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise UsageError(f"config.json lacks {error.args[0]!r}") from error


def _check(config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    scaling = first(config.get("rope_scaling"), rope)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise UsageError(f"config.json: rope_scaling type {kind!r} is not known for Persimmon")
    for key, known in (("hidden_act", "relu2"), ("qk_layernorm", True)):
        if config.get(key, known) != known:
            raise UsageError(f"config.json: {key} {config[key]!r} is not known for Persimmon")


class Attention(nn.Module):
    """Multi-head attention on one fused projection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.rotary_dims, self.base = config.rotary_dims, config.rope_theta
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps)
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps)

    def _rope(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x, self.rotary_dims, traditional=False, base=self.base, scale=1.0, offset=offset
        )

    def __call__(
        self, x: mx.array, mask: Mask, cache: Cache | None, last_only: bool = False
    ) -> mx.array:
        B, L, D = x.shape
        qkv = self.query_key_value(x).reshape(B, L, self.heads, 3, self.head_dim)
        q, k, v = (qkv[..., i, :].swapaxes(1, 2) for i in range(3))
        offset = 0 if cache is None else cache.offset
        q = self._rope(self.q_layernorm(q), offset)
        k = self._rope(self.k_layernorm(k), offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if last_only:
            q = q[:, :, -1:]
        out = attend(q, k, v, cache, self.head_dim**-0.5, mask)
        return self.dense(out.swapaxes(1, 2).reshape(B, q.shape[2], D))


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(relu_squared(self.dense_h_to_4h(x)))


class Block(decoder.Block):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def fuse(self) -> None:
        """Nothing: the checkpoint's projections are fused as they come."""


class LanguageModel(decoder.LanguageModel):
    """`model.norm` is what the checkpoint calls `model.final_layernorm`."""

    def __init__(self, config: TextConfig) -> None:
        layers = [Block(config) for _ in range(config.num_hidden_layers)]
        super().__init__(config, layers, nn.LayerNorm(config.hidden_size, config.layer_norm_eps))
