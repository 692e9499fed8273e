"""CLIP and SigLIP vision transformers: pixels [B, H, W, 3], normalised -> hidden states [B, N, D].

One file for both: CLIP has a class token, a norm before the layers, quick GELU and no bias in its
patch embedding; SigLIP has none of these and the tanh GELU. Only the layers up to the one whose
output is wanted exist; `fold` leaves the rest of a checkpoint out by name.
Source: openai/CLIP, clip/model.py; big_vision, models/vit.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import check
from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..kernels import attention, gelu, gelu_tanh, mlp, quick_gelu
from .attended import EARLY, Attended, scores, told

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu}
GEOMETRY = (
    "hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size",
)  # fmt: skip


class Kind(NamedTuple):
    """What a tower's `model_type` says where its config does not."""

    class_token: bool
    hidden_act: str
    layer_norm_eps: float


KINDS = {
    "clip_vision_model": Kind(True, "quick_gelu", 1e-5),
    "siglip_vision_model": Kind(False, "gelu_pytorch_tanh", 1e-6),
}


@dataclass(frozen=True)
class ViTConfig:
    """Geometry of a tower: `layers` counts those that are run, `post_norm` is the final norm."""

    hidden_size: int
    intermediate_size: int
    layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool
    post_norm: bool = False

    def __post_init__(self) -> None:
        check(self)
        sizes = (self.hidden_size, self.intermediate_size, self.image_size, self.patch_size)
        if min(*sizes, self.num_attention_heads, self.layer_norm_eps) <= 0 or self.layers < 0:
            raise UsageError("vision_config: a size or layer_norm_eps is not above zero")
        if self.hidden_act not in ACTIVATIONS:
            raise UsageError(f"vision_config: hidden_act {self.hidden_act!r} is not known")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError("vision_config: hidden_size is no multiple of num_attention_heads")

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], feature_layer: Any, *, post_norm: bool = False
    ) -> "ViTConfig":
        """Read a `vision_config` of CLIP or SigLIP.

        feature_layer: index into the N + 1 hidden states (embeddings first) of the N layers there
        are; -2 is what leaves the last but one. Raises UsageError for a missing key or a layer
        that is not there.
        """
        if isinstance(feature_layer, list) and len(feature_layer) == 1:
            feature_layer = feature_layer[0]
        if type(feature_layer) is not int:
            raise UsageError(
                f"config.json: vision_feature_layer {str(feature_layer)[:40]}: features of one "
                "layer are supported, not of several"
            )
        kind = config.get("model_type", "clip_vision_model")
        if kind not in KINDS:
            raise UsageError(f"vision_config: model_type {kind!r} is not known")
        try:
            available = config["num_hidden_layers"]
            layers = feature_layer + (available + 1 if feature_layer < 0 else 0)
            if not 0 <= layers <= available:
                raise UsageError(f"layer {feature_layer} of a vision tower that has {available}")
            return cls(
                layers=layers,
                class_token=KINDS[kind].class_token,
                hidden_act=config.get("hidden_act", KINDS[kind].hidden_act),
                layer_norm_eps=config.get("layer_norm_eps", KINDS[kind].layer_norm_eps),
                post_norm=post_norm,
                **{name: config[name] for name in GEOMETRY},
            )
        except KeyError as error:
            raise UsageError(f"vision_config lacks {error.args[0]!r}") from error

    @property
    def grid(self) -> int:
        """Patches along a side; a rest that fills no patch is cut off, as in the originals."""
        return self.image_size // self.patch_size


class PatchEmbedding(nn.Module):
    """A convolution of kernel = stride = patch, as one matmul: [B, H, W, 3] -> [B, N, D]."""

    def __init__(self, size: int, width: int, bias: bool) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Linear(3 * size**2, width, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, _ = x.shape
        rows, columns, p = H // self.size, W // self.size, self.size
        x = x[:, : rows * p, : columns * p].reshape(B, rows, p, columns, p, 3)
        return self.proj(x.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, -1))


class Attention(nn.Module):
    """Full attention over the patches; `mask` bool [B, 1, 1, N] hides padding patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def split(self, x: mx.array) -> tuple[mx.array, ...]:
        """Queries, keys and values [B, heads, N, D / heads] of [B, N, D]."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        return tuple(qkv.transpose(2, 0, 3, 1, 4))

    @property
    def scale(self) -> float:
        return float((self.out_proj.weight.shape[0] // self.heads) ** -0.5)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        B, N, D = x.shape
        q, k, v = self.split(x)
        x = attention(q, k, v, self.scale, mask)
        return self.out_proj(x.transpose(0, 2, 1, 3).reshape(B, N, D))


class Layer(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.self_attn = Attention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self._activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + mlp(self.layer_norm2(x), self.fc1, self.fc2, self._activation)


class ViT(nn.Module):
    """The tower up to its last wanted layer."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.patch_embedding = PatchEmbedding(config.patch_size, width, not config.class_token)
        tokens = config.grid**2 + config.class_token
        self.position_embedding = mx.zeros((tokens, width))
        if config.class_token:
            self.class_embedding = mx.zeros((width,))
            self.pre_layernorm = nn.LayerNorm(width, eps=eps)
        self.layers = [Layer(config) for _ in range(config.layers)]
        if config.post_norm:
            self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def __call__(
        self, x: mx.array, positions: mx.array | None = None, mask: mx.array | None = None
    ) -> mx.array:
        """Hidden states [B, N, D], class token first where there is one.

        positions int[B, N]: rows of the position embedding, when they are not simply 0..N-1.
        """
        x = self.patch_embedding(x)
        if "class_embedding" in self:
            first = mx.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[2]))
            x = mx.concatenate([first, x], axis=1)
        table = self.position_embedding
        x = x + (table if positions is None else table[positions])
        if "pre_layernorm" in self:
            x = self.pre_layernorm(x)
        calls = told()
        if calls is not None:
            return self._telling(x, mask, calls)
        for layer in self.layers:
            x = layer(x, mask)
        return self.post_layernorm(x) if "post_layernorm" in self else x

    def _telling(self, x: mx.array, mask: mx.array | None, calls: list[Attended]) -> mx.array:
        """The layers and what follows them, with what is told of two of them."""
        final = len(self.layers) - 1
        early_layer, first = min(round(EARLY * len(self.layers)), final), "class_embedding" in self
        for index, layer in enumerate(self.layers):
            if index in (early_layer, final):
                q, k, _ = layer.self_attn.split(layer.layer_norm1(x))
                seen = scores(q, k, layer.self_attn.scale, mask)
            if index == early_layer:
                early = seen.mean(axis=(1, 2))[:, int(first) :]
            x = layer(x, mask)
        x = self.post_layernorm(x) if "post_layernorm" in self else x
        late, keys = seen.mean(axis=(1, 2)), k.astype(mx.float32).mean(axis=1)
        of_class = seen[:, :, 0, 1:].sum(axis=1) if first else None
        calls.append(Attended(early, late[:, int(first) :], of_class, keys[:, int(first) :], x))
        return x


def fold(weights: Weights, prefix: str, config: ViTConfig) -> dict[str, mx.array]:
    """Take the weights under `prefix` (Hugging Face's names, NHWC) and give the parameters of ViT.

    q, k and v become one matmul, the patch convolution another. Layers after the last wanted one,
    a final norm nobody asks for, position ids and a pooling head are left out by name.
    Raises UsageError for a missing or misshapen weight.
    """
    D, p = config.hidden_size, config.patch_size
    embeddings = f"{prefix}embeddings."
    patch = weights.take(f"{embeddings}patch_embedding.weight", D, p, p, 3)
    tokens = config.grid**2 + config.class_token
    folded = {
        "patch_embedding.proj.weight": patch.reshape(D, -1),
        "position_embedding": weights.take(f"{embeddings}position_embedding.weight", tokens, D),
    }
    if config.class_token:
        folded["class_embedding"] = weights.take(f"{embeddings}class_embedding", D)
        folded |= weights.pair(f"{prefix}pre_layrnorm", "pre_layernorm", D)
    else:
        folded["patch_embedding.proj.bias"] = weights.take(f"{embeddings}patch_embedding.bias", D)
    for index in range(config.layers):
        folded |= _layer(weights, f"{prefix}encoder.layers.{index}.", f"layers.{index}.", config)
    if config.post_norm:
        folded |= weights.pair(f"{prefix}post_layernorm", "post_layernorm", D)
    for unused in ("encoder.layers.", "post_layernorm.", "head.", "embeddings.position_ids"):
        weights.take_prefix(prefix + unused)
    return folded


def _layer(weights: Weights, source: str, target: str, config: ViTConfig) -> dict[str, mx.array]:
    D, inner, attention = config.hidden_size, config.intermediate_size, f"{source}self_attn."
    parts = [weights.pair(f"{attention}{x}_proj", x, D, D) for x in "qkv"]
    return {
        **{
            f"{target}self_attn.qkv.{name}": mx.concatenate(
                [part[f"{x}.{name}"] for x, part in zip("qkv", parts, strict=True)]
            )
            for name in ("weight", "bias")
        },
        **weights.pair(f"{attention}out_proj", f"{target}self_attn.out_proj", D, D),
        **weights.pair(f"{source}layer_norm1", f"{target}layer_norm1", D),
        **weights.pair(f"{source}layer_norm2", f"{target}layer_norm2", D),
        **weights.pair(f"{source}mlp.fc1", f"{target}fc1", inner, D),
        **weights.pair(f"{source}mlp.fc2", f"{target}fc2", D, inner),
    }
