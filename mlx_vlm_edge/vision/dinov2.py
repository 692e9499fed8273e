"""DINOv2, folded: normalised pixels [B, H, W, 3] -> hidden states [B, 1 + N, D], class token first.

A ViT with a class token, a scale behind each branch, a norm at its end and, in the giant one,
SwiGLU in its MLPs. Folded means that layer scale is in the last matmul of its branch, and that the
position embedding is for the pictures' size already: its table is for 518 pixels.
Source: facebookresearch/dinov2; transformers, models/dinov2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import check, first
from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..kernels import gelu, mlp, swiglu
from .vit import Attention, PatchEmbedding

CUBIC = -0.75  # torch's bicubic kernel
# What transformers 4.37 and Meta's code add to the grid that they resize the position embedding to,
# so that rounding takes no row from it; every position moves a little by it.
GRID_OFFSET = 0.1
DEFAULTS = {
    "mlp_ratio": 4, "patch_size": 14, "image_size": 518, "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
}  # fmt: skip
ONLY = {"hidden_act": "gelu", "qkv_bias": True, "num_register_tokens": 0}


@dataclass(frozen=True)
class Dinov2Config:
    """Geometry of a tower. input_size: of its pictures, in pixels; image_size: the size that its
    position embedding is for in the checkpoint; intermediate_size: inside an MLP."""

    hidden_size: int
    intermediate_size: int
    layers: int
    num_attention_heads: int
    image_size: int
    input_size: int
    patch_size: int
    layer_norm_eps: float
    swiglu: bool

    def __post_init__(self) -> None:
        check(self)
        sizes = (self.hidden_size, self.intermediate_size, self.num_attention_heads, self.layers)
        if min(*sizes, self.patch_size, self.layer_norm_eps) <= 0:
            raise UsageError("vision_config: a size or layer_norm_eps is not above zero")
        if min(self.image_size, self.input_size) < self.patch_size:
            raise UsageError("vision_config: a picture of less than a patch cannot be")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError("vision_config: hidden_size is no multiple of num_attention_heads")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Dinov2Config":
        """Read a `vision_config` with transformers' keys, and `input_size` where that is not the
        position embedding's own. Raises UsageError for a missing key or an unknown value."""
        for key, value in ONLY.items():
            if config.get(key, value) != value:
                raise UsageError(f"vision_config: {key} {config[key]!r} is not known in DINOv2")
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if key not in config:
                raise UsageError(f"vision_config lacks {key!r}")
        said = {**DEFAULTS, **config}
        width, inner = said["hidden_size"], int(said["hidden_size"] * said["mlp_ratio"])
        gated = said["use_swiglu_ffn"]
        return cls(
            hidden_size=width,
            intermediate_size=(int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner,
            layers=said["num_hidden_layers"],
            num_attention_heads=said["num_attention_heads"],
            image_size=said["image_size"],
            input_size=first(said.get("input_size"), said["image_size"]),
            patch_size=said["patch_size"],
            layer_norm_eps=said["layer_norm_eps"],
            swiglu=gated,
        )

    @property
    def grid(self) -> int:
        """Patches along a side of a picture; a rest that fills no patch is cut off."""
        return self.input_size // self.patch_size


class SwiGLU(nn.Module):
    """Both halves of what is multiplied in one matmul, [..., D] -> [..., D]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.weights_in = nn.Linear(width, 2 * inner)
        self.weights_out = nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.weights_in(x), 2, axis=-1)
        return self.weights_out(swiglu(gate, up))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        return mlp(x, self.fc1, self.fc2, gelu)


class Layer(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = (SwiGLU if config.swiglu else MLP)(width, config.intermediate_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.norm1(x), None)
        return x + self.mlp(self.norm2(x))


class Dinov2(nn.Module):
    """The whole tower, for pictures of one size."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_embedding = PatchEmbedding(config.patch_size, width, bias=True)
        self.position_embedding = mx.zeros((1 + config.grid**2, width))
        self.class_embedding = mx.zeros((width,))
        self.layers = [Layer(config) for _ in range(config.layers)]
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.patch_embedding(x)
        first = mx.broadcast_to(self.class_embedding, (x.shape[0], 1, x.shape[2]))
        x = mx.concatenate([first, x], axis=1) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def cubic_matrix(size: int, out: int) -> mx.array:
    """float32[out, size]: what a line of `size` samples is multiplied with to have `out` of them.

    torch's bicubic interpolation of a scale factor (out + 0.1) / size: sample i lies at
    (i + 0.5) * size / (out + 0.1) - 0.5, between four neighbours, the edge's repeated.
    """
    matrix = [[0.0] * size for _ in range(out)]
    for i, row in enumerate(matrix):
        place = (i + 0.5) * size / (out + GRID_OFFSET) - 0.5
        before = math.floor(place)
        for neighbour in range(before - 1, before + 3):
            row[min(max(neighbour, 0), size - 1)] += _cubic(abs(place - neighbour))
    return mx.array(matrix)


def _cubic(distance: float) -> float:
    """The weight of a neighbour at that distance, 0 to 2."""
    d, a = distance, CUBIC
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def resized_positions(table: mx.array, grid: int) -> mx.array:
    """A position embedding [1 + n * n, D] for a grid of `grid` patches a side; the class token's
    row stays. In float32, as the original."""
    side = math.isqrt(table.shape[0] - 1)
    if side == grid:
        return table
    matrix = cubic_matrix(side, grid)
    rows = matrix @ table[1:].astype(mx.float32).reshape(side, -1)  # [grid, side * D]
    resized = matrix @ rows.reshape(grid, side, -1)
    return mx.concatenate([table[:1], resized.reshape(grid * grid, -1).astype(table.dtype)])


def fold(weights: Weights, prefix: str, config: Dinov2Config) -> dict[str, mx.array]:
    """Take the weights under `prefix` (transformers' names, NHWC) and give Dinov2's parameters.

    Layer scale is multiplied in in float32. Raises UsageError for a missing or misshapen weight.
    """
    D, p, side = config.hidden_size, config.patch_size, config.image_size // config.patch_size
    embeddings = f"{prefix}embeddings."
    patches, table = f"{embeddings}patch_embeddings.projection.", f"{embeddings}position_embeddings"
    folded = {
        "patch_embedding.proj.weight": weights.take(f"{patches}weight", D, p, p, 3).reshape(D, -1),
        "patch_embedding.proj.bias": weights.take(f"{patches}bias", D),
        "class_embedding": weights.take(f"{embeddings}cls_token", 1, 1, D).reshape(D),
        "position_embedding": resized_positions(
            weights.take(table, 1, 1 + side * side, D)[0], config.grid
        ),
        **weights.pair(f"{prefix}layernorm", "norm", D),
    }
    for index in range(config.layers):
        folded |= _layer(weights, f"{prefix}encoder.layer.{index}.", f"layers.{index}.", config)
    weights.drop(f"{embeddings}mask_token")  # of its training
    return folded


def _layer(weights: Weights, source: str, target: str, config: Dinov2Config) -> dict[str, mx.array]:
    D, inner, attention = config.hidden_size, config.intermediate_size, f"{source}attention."
    qkv = [
        weights.pair(f"{attention}attention.{name}", "", D, D) for name in ("query", "key", "value")
    ]
    into, out, hidden = ("fc1", "fc2", inner)
    if config.swiglu:
        into, out, hidden = ("weights_in", "weights_out", 2 * inner)
    return {
        **{
            f"{target}attention.qkv{name}": mx.concatenate([part[name] for part in qkv])
            for name in qkv[0]
        },
        **_scaled(weights, f"{attention}output.dense", f"{target}attention.out_proj", (D, D),
                  f"{source}layer_scale1.lambda1"),
        **weights.pair(f"{source}norm1", f"{target}norm1", D),
        **weights.pair(f"{source}norm2", f"{target}norm2", D),
        **weights.pair(f"{source}mlp.{into}", f"{target}mlp.{into}", hidden, D),
        **_scaled(weights, f"{source}mlp.{out}", f"{target}mlp.{out}", (D, inner),
                  f"{source}layer_scale2.lambda1"),
    }  # fmt: skip


def _scaled(
    weights: Weights, source: str, target: str, shape: tuple[int, int], scale: str
) -> dict[str, mx.array]:
    """A linear layer whose outputs are each multiplied by an entry of `scale`."""
    factor = weights.take(scale, shape[0]).astype(mx.float32)
    layer = weights.pair(source, target, *shape)
    weight, bias = (layer[f"{target}.{name}"].astype(mx.float32) for name in ("weight", "bias"))
    return {f"{target}.weight": weight * factor[:, None], f"{target}.bias": bias * factor}
