"""The Idefics2 connector: image features of any number -> always the same few visual tokens.

A SwiGLU projection brings features to the language model's width; learned latents then gather what
they hold, in layers of attention whose keys are the features and the latents themselves.
Source: transformers, models/idefics2; arXiv 2405.02246.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import check
from ..errors import UsageError
from ..kernels import attention, swiglu

EXPANSION = 4  # of a layer's MLP


@dataclass(frozen=True)
class PerceiverConfig:
    """Geometry: latents are `hidden_size` wide, the projection of features `projected` inside."""

    hidden_size: int
    projected: int
    latents: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float

    def __post_init__(self) -> None:
        check(self, positive=True)
        if self.heads % self.kv_heads:
            raise UsageError(
                f"perceiver_config: {self.heads} heads cannot share {self.kv_heads} key heads"
            )


class SwiGLU(nn.Module):
    """[..., inputs] -> [..., out], without biases."""

    def __init__(self, inputs: int, inner: int, out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(inputs, inner, bias=False)
        self.up_proj = nn.Linear(inputs, inner, bias=False)
        self.down_proj = nn.Linear(inner, out, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Attention(nn.Module):
    """Latents [B, L, D] look at the context [B, N, D] and at themselves, without positions."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        width, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(width, config.heads * D, bias=False)
        self.k_proj = nn.Linear(width, config.kv_heads * D, bias=False)
        self.v_proj = nn.Linear(width, config.kv_heads * D, bias=False)
        self.o_proj = nn.Linear(config.heads * D, width, bias=False)

    def __call__(self, latents: mx.array, context: mx.array) -> mx.array:
        seen = mx.concatenate([context, latents], axis=1)
        q, k, v = (
            y.reshape(*y.shape[:2], -1, self.head_dim).swapaxes(1, 2)  # [B, heads, L or N + L, d]
            for y in (self.q_proj(latents), self.k_proj(seen), self.v_proj(seen))
        )
        out = attention(q, k, v, self.head_dim**-0.5)
        return self.o_proj(out.swapaxes(1, 2).reshape(*latents.shape[:2], -1))


class Layer(nn.Module):
    """The context stays as it is from layer to layer; only its norm is the layer's own."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_latents_norm = nn.RMSNorm(width, eps=eps)
        self.input_context_norm = nn.RMSNorm(width, eps=eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.mlp = SwiGLU(width, EXPANSION * width, width)

    def __call__(self, latents: mx.array, context: mx.array) -> mx.array:
        context = self.input_context_norm(context)
        latents = latents + self.self_attn(self.input_latents_norm(latents), context)
        return latents + self.mlp(self.post_attention_layernorm(latents))


class Resampler(nn.Module):
    """Context [B, N, D] -> latents [B, L, D]."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.latents = mx.zeros((config.latents, config.hidden_size))
        self.layers = [Layer(config) for _ in range(config.depth)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, context: mx.array) -> mx.array:
        latents = mx.broadcast_to(self.latents, (context.shape[0], *self.latents.shape))
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)


class Perceiver(nn.Module):
    """Image features [B, N, C] -> visual tokens [B, L, D]."""

    def __init__(self, features: int, config: PerceiverConfig) -> None:
        super().__init__()
        self.modality_projection = SwiGLU(features, config.projected, config.hidden_size)
        self.perceiver_resampler = Resampler(config)

    def __call__(self, x: mx.array) -> mx.array:
        return self.perceiver_resampler(self.modality_projection(x))
