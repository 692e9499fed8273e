"""MoE-LLaVA's decoders: StableLM 2, Phi-2 and Qwen 1, every second MLP a mixture of experts.

Unlike Llama: StableLM has LayerNorms and turns a quarter of each head, Phi-2 attention and MLP side
by side after one LayerNorm, with biases everywhere, Qwen q, k and v in one projection.
mlx-lm has the three as well, but its package imports transformers (three seconds before a first
token), and its layers take neither several rows of caches nor the last position alone; tests hold
ours to them.
Source: PKU-YuanGroup/MoE-LLaVA, moellava/model/language_model/{stablelm,phi,qwen}.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import first
from ..errors import UsageError
from ..kernels import gelu_tanh
from . import decoder, llama
from .cache import Cache, Mask
from .mixture import Mixture, MixtureConfig

Said = Mapping[str, Any]
ROPE = 10000.0
# What the code of each base model knows alone; a config may leave it out.
ONLY: dict[str, dict[str, Any]] = {
    "stablelm": {"hidden_act": "silu", "qk_layernorm": False, "use_parallel_residual": False},
    "phi": {"hidden_act": "gelu_new", "qk_layernorm": False},
    "qwen": {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True},
}


@dataclass(frozen=True, kw_only=True)
class TextConfig(llama.TextConfig):
    """Geometry of a decoder. rms_norm_eps: of its norms, whichever they are. intermediate_size: of
    an MLP. rotary_dims: how many leading dimensions of a head the rotary positions turn."""

    base: str
    rotary_dims: int
    moe: MixtureConfig

    @classmethod
    def of(cls, config: Said, base: str) -> "TextConfig":
        """Read the flat config of a MoE-LLaVA. Raises UsageError for a missing key or an unknown
        value."""
        for key, known in ONLY[base].items():
            if (value := config.get(key, known)) != known:
                raise UsageError(f"config.json: {key} {value!r} is not known in MoE-LLaVA")
        try:
            heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
            own = _BASES[base](config, config["hidden_size"] // heads)
            _check_rope(config, own["rope_theta"], own["rotary_dims"] * heads)
            return cls(
                base=base,
                hidden_size=config["hidden_size"],
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=first(config.get("num_key_value_heads"), heads),
                vocab_size=config["vocab_size"],
                head_dim=config["hidden_size"] // heads,
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                moe=MixtureConfig.from_dict(config["moe"], layers),
                **own,
            )
        except KeyError as error:
            raise UsageError(f"config.json lacks {error.args[0]!r}") from error


def _check_rope(config: Said, theta: float, rotary: int) -> None:
    """Raises UsageError for scaled positions, which none of the three has, or for others than are
    read where their code has them. rotary: dimensions of all heads that are turned."""
    plain = {"rope_type": "default", "type": "default", "factor": 1.0, "rope_theta": theta,
             "partial_rotary_factor": rotary / config["hidden_size"]}  # fmt: skip
    for key in ("rope_scaling", "rope_parameters"):
        said = first(config.get(key), {})
        if not isinstance(said, Mapping) or any(
            value not in (None, plain.get(name)) for name, value in said.items()
        ):
            raise UsageError(f"config.json: {key} {said!r} is not known in MoE-LLaVA")


def _stablelm(config: Said, head_dim: int) -> dict[str, Any]:
    return {
        "intermediate_size": config["intermediate_size"],
        "rms_norm_eps": first(config.get("norm_eps"), config.get("layer_norm_eps"), 1e-5),
        "rope_theta": first(config.get("rope_theta"), ROPE),
        "rotary_dims": int(head_dim * first(config.get("rope_pct"), 0.25)),
        "max_position_embeddings": first(config.get("max_position_embeddings"), 4096),
        "qkv_bias": config.get("use_qkv_bias", False),
    }


def _phi(config: Said, head_dim: int) -> dict[str, Any]:
    return {
        "intermediate_size": config["intermediate_size"],
        "rms_norm_eps": first(config.get("layer_norm_eps"), 1e-5),
        "rope_theta": first(config.get("rope_theta"), ROPE),
        "rotary_dims": int(head_dim * first(config.get("partial_rotary_factor"), 0.5)),
        "max_position_embeddings": first(config.get("max_position_embeddings"), 2048),
        "qkv_bias": True,
        "o_bias": True,
    }


def _qwen(config: Said, head_dim: int) -> dict[str, Any]:
    """Up to seq_length positions its dynamic NTK and logn attention change nothing."""
    if config.get("kv_channels", head_dim) != head_dim:
        raise UsageError(f"config.json: kv_channels {config['kv_channels']} fits no heads")
    most = first(config.get("max_position_embeddings"), 8192)
    return {
        "intermediate_size": config["intermediate_size"] // 2,
        "rms_norm_eps": first(config.get("layer_norm_epsilon"), 1e-6),
        "rope_theta": first(config.get("rotary_emb_base"), ROPE),
        "rotary_dims": head_dim,
        "max_position_embeddings": min(most, first(config.get("seq_length"), most)),
        "qkv_bias": True,
    }


_BASES: dict[str, Callable[[Said, int], dict[str, Any]]] = {
    "stablelm": _stablelm, "phi": _phi, "qwen": _qwen,
}  # fmt: skip


class Attention(llama.Attention):
    """Llama's with rotary positions on a part of each head; Qwen's projections are one as they
    come."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.rotary_dims = config.rotary_dims
        if config.base == "qwen":
            del self.q_proj, self.k_proj, self.v_proj
            self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def fuse(self) -> None:
        if "qkv_proj" not in self:
            super().fuse()

    def _rope(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(
            x, self.rotary_dims, traditional=False, base=self.base, scale=1.0, offset=offset
        )


class PlainMLP(nn.Module):
    """Phi-2's: two layers, the tanh GELU between them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def fuse(self) -> None:
        """Nothing: no two layers have the same input."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gelu_tanh(self.fc1(x)))


def norm(config: TextConfig) -> nn.Module:
    kind = nn.RMSNorm if config.base == "qwen" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)


class Block(decoder.Block):
    """A layer; `mlp` is a mixture where it has experts."""

    def __init__(self, config: TextConfig, experts: int) -> None:
        super().__init__()
        kind = PlainMLP if config.base == "phi" else llama.MLP
        self.self_attn = Attention(config)
        self.input_layernorm = norm(config)
        if config.base != "phi":
            self.post_attention_layernorm = norm(config)
        if experts:
            mlps = [kind(config) for _ in range(experts)]
            self.mlp = Mixture(config.moe, config.hidden_size, mlps)
        else:
            self.mlp = kind(config)

    def fuse(self) -> None:
        self.self_attn.fuse()
        self.mlp.fuse()

    def __call__(
        self, x: mx.array, mask: Mask, cache: Cache | None, last_only: bool = False
    ) -> mx.array:
        if last_only and isinstance(self.mlp, Mixture) and self.mlp.drops(x.shape[1]):
            return self.whole(x, mask, cache, False)[:, -1:]  # the others may take its place
        return self.whole(x, mask, cache, last_only)

    def whole(self, x: mx.array, mask: Mask, cache: Cache | None, last_only: bool) -> mx.array:
        """The layer, without the positions that it need not compute."""
        return super().__call__(x, mask, cache, last_only)

    def parts(self) -> list[nn.Module]:
        """The layer or, of a mixture, the layer with each expert as its MLP, and the gate: whom a
        token goes to turns on the last digit, so that layers with gates cannot be held together."""
        if not isinstance(self.mlp, Mixture):
            return [self]
        layers = [copy(self) for _ in self.mlp.experts]
        for layer, expert in zip(layers, self.mlp.experts, strict=True):
            layer.mlp = expert
        return [*layers, Gate(self)]


class Gate(nn.Module):
    """What the gate of a layer thinks of its input, added to that's first dimensions."""

    def __init__(self, layer: Block) -> None:
        super().__init__()
        self.norm, self.mlp = layer.input_layernorm, layer.mlp

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None) -> mx.array:
        likes = mx.softmax(self.mlp.logits(self.norm(x)), axis=-1)
        return x + mx.pad(likes, [(0, 0), (0, 0), (0, x.shape[-1] - likes.shape[-1])])


class ParallelBlock(Block):
    """Attention and MLP on the same normed input."""

    def whole(self, x: mx.array, mask: Mask, cache: Cache | None, last_only: bool) -> mx.array:
        normed = self.input_layernorm(x)
        mixed = self.self_attn(normed, mask, cache, last_only)
        if last_only:
            x, normed = x[:, -1:], normed[:, -1:]
        return x + mixed + self.mlp(normed)


class LanguageModel(decoder.LanguageModel):
    def __init__(self, config: TextConfig) -> None:
        kind = ParallelBlock if config.base == "phi" else Block
        layers = [kind(config, experts) for experts in config.moe.experts]
        super().__init__(config, layers, norm(config))
        self.moe = config.moe

    def splits(self, length: int) -> bool:
        """Not where an expert may drop tokens: which ones hangs on how many go in together."""
        counts = filter(None, self.moe.experts)
        return all(self.moe.capacity(length, count) >= length for count in counts)

    def blocks(self, index: int) -> list[nn.Module]:
        parts: list[nn.Module] = self.model.layers[index].parts()
        return parts
