"""Llama and Qwen2 decoders: input embeddings [B, L, D] -> logits [B, L, V].

The two differ in their biases and defaults only, which the config tells. Module names are the
checkpoint's (`model.layers.0.self_attn.q_proj`); `fuse` merges q/k/v and gate/up after loading.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import check, first, number
from ..errors import UsageError
from ..kernels import swiglu
from . import decoder
from .attend import attend
from .cache import Cache, Mask
from .fuse import fuse

_BIASES = {"llama": False, "qwen2": True}  # q/k/v biases where the config does not say
# All that `TextConfig.from_dict` reads, but for the tie of the output head, which families settle.
KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "attention_bias", "mlp_bias",
    "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    """Geometry of a decoder, under the checkpoint's own field names."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: Mapping[str, Any] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        check(self, positive=True)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"config.json: {self.num_attention_heads} heads cannot share "
                f"{self.num_key_value_heads} key and value heads"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], model_type: str) -> "TextConfig":
        """Read a Llama or Qwen2 config. Raises UsageError for a missing key or activation."""
        if config.get("hidden_act", "silu") != "silu":
            raise UsageError(f"config.json: hidden_act {config['hidden_act']!r} is not known")
        try:
            _refuse_window(config)
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            bias = config.get("attention_bias", _BIASES[model_type])
            rope = first(config.get("rope_parameters"), {})
            own = first(config.get("rope_scaling"), {})
            scaling = rope if own == {} and rope.get("rope_type") else own
            return cls(
                hidden_size=hidden,
                num_hidden_layers=config["num_hidden_layers"],
                intermediate_size=config["intermediate_size"],
                num_attention_heads=heads,
                num_key_value_heads=first(config.get("num_key_value_heads"), heads),
                vocab_size=config["vocab_size"],
                head_dim=first(config.get("head_dim"), hidden // heads),
                rms_norm_eps=first(config.get("rms_norm_eps"), 1e-6),
                rope_theta=first(config.get("rope_theta"), rope.get("rope_theta"), 10000.0),
                max_position_embeddings=first(config.get("max_position_embeddings"), 32768),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                rope_scaling=scaling,
                qkv_bias=bias,
                o_bias=config.get("attention_bias", False),
                mlp_bias=config.get("mlp_bias", False),
            )
        except KeyError as error:
            raise UsageError(f"config.json lacks {error.args[0]!r}") from error
        except (TypeError, ZeroDivisionError, AttributeError) as error:
            raise UsageError(f"config.json: a size or rope setting is wrong ({error})") from error


def _refuse_window(config: Mapping[str, Any]) -> None:
    """Raises UsageError where a layer would not see all positions before it, as Qwen2's may not.

    Defaults are transformers'.
    """
    if not config.get("use_sliding_window"):
        return
    kinds, full = config.get("layer_types"), first(config.get("max_window_layers"), 28)
    slides = full < config["num_hidden_layers"] if kinds is None else "sliding_attention" in kinds
    window = first(config.get("sliding_window"), 4096)
    if slides and window < first(config.get("max_position_embeddings"), 32768):
        raise UsageError(
            f"config.json: use_sliding_window, so that layers see the last {window:,} positions "
            "alone, is not known"
        )


def rope_periods(config: TextConfig) -> mx.array | None:
    """Rotation period of every pair of dimensions, float[head_dim / 2] (in positions / 2 pi).

    None when the plain theta ** (2i / head_dim) holds. Raises UsageError for an unknown scaling.
    Source of llama3: Meta's llama-models, models/llama3/model.py, apply_scaling.
    """
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    periods = config.rope_theta ** (mx.arange(0, config.head_dim, 2) / config.head_dim)
    if kind not in ("linear", "llama3"):
        raise UsageError(f"config.json: rope_scaling type {kind!r} is not known")
    factor = number(scaling, "factor")
    if kind == "linear":
        return periods * factor
    low, high = number(scaling, "low_freq_factor", 1.0), number(scaling, "high_freq_factor", 4.0)
    context = number(scaling, "original_max_position_embeddings")
    if not high > low:
        raise UsageError(f"config.json: high_freq_factor {high:g} is not above the low one")
    turns = context / (2 * math.pi * periods)  # rotations within the original context
    smooth = mx.clip((turns - low) / (high - low), 0.0, 1.0)
    return periods / ((1 - smooth) / factor + smooth)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (rotate-half, over the whole head)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D = config.head_dim
        self.base = config.rope_theta
        self._periods = rope_periods(config)
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * D, hidden, bias=config.o_bias)

    def fuse(self) -> None:
        fuse(self, ("q_proj", "k_proj", "v_proj"), "qkv_proj")

    def qkv(self, x: mx.array) -> mx.array:
        """Queries, keys and values of x [B, L, D]: [B, L, (heads + 2 kv_heads) * head_dim]."""
        if "qkv_proj" in self:
            return self.qkv_proj(x)
        return mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)

    def _rope(self, x: mx.array, offset: int) -> mx.array:
        base = self.base if self._periods is None else None
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=base, scale=1.0, offset=offset,
            freqs=self._periods,
        )  # fmt: skip

    def __call__(
        self, x: mx.array, mask: Mask, cache: Cache | None, last_only: bool = False
    ) -> mx.array:
        return self.o_proj(self.attend(self.qkv(x), mask, cache, last_only))

    def attend(
        self, qkv: mx.array, mask: Mask, cache: Cache | None, last_only: bool = False
    ) -> mx.array:
        """What `qkv` gave, in the order of positions -> [B, L, heads * head_dim], L = 1 with
        `last_only`."""
        B, L, _ = qkv.shape
        x = qkv.reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        turned, v = mx.split(x, [self.heads + self.kv_heads], axis=1)
        turned = self._rope(turned, 0 if cache is None else cache.offset)
        q, k = mx.split(turned, [self.heads], axis=1)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if last_only:
            q = q[:, :, -1:]
        out = attend(q, k, v, cache, self.head_dim**-0.5, mask)
        return out.swapaxes(1, 2).reshape(B, q.shape[2], -1)


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def fuse(self) -> None:
        fuse(self, ("gate_proj", "up_proj"), "gate_up_proj")

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up))


class Block(decoder.Block):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def fuse(self) -> None:
        self.self_attn.fuse()
        self.mlp.fuse()


class LanguageModel(decoder.LanguageModel):
    def __init__(self, config: TextConfig) -> None:
        layers = [Block(config) for _ in range(config.num_hidden_layers)]
        super().__init__(config, layers, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
