"""The vision towers and what stands in for one: the cost of a tile's way to image features.

Every count is that of this runtime's folded towers: one convolution per re-parameterised branch,
BatchNorm inside its neighbour, no layer that is not run.
"""

import math
from collections.abc import Mapping
from typing import Any

from mlx_vlm_edge.errors import UsageError

from .work import Work, attention, depthwise, linear, norm

FASTVIT_STRIDE = 64
_SQUEEZE = 16  # channels of conv_exp's squeeze-and-excite are so many times fewer
_LINES = {"clip_vision_model": True, "siglip_vision_model": False}  # has a class token


def fastvithd(vision: Mapping[str, Any], height: int, width: int) -> dict[str, Work]:
    """Each module's work, by Apple's names: "patch_embed", "network.0" to "network.10", "conv_exp".

    vision: a `vision_config` with embed_dims, layers, mlp_ratios and the rest. Raises UsageError
    for a picture whose sides are no multiples of 64.
    """
    if height % FASTVIT_STRIDE or width % FASTVIT_STRIDE or min(height, width) <= 0:
        raise UsageError(f"image size {max(height, width)}: FastViTHD takes multiples of 64")
    dims = vision["embed_dims"]
    positions = height * width // 16  # the stem has a stride of 4
    stem = (
        linear(positions * 4, 27, dims[0])
        + depthwise(positions, dims[0], 3, stride=2)
        + linear(positions, dims[0], dims[0])
    )
    modules = {"patch_embed": stem}

    def add(work: Work) -> None:
        modules[f"network.{len(modules) - 1}"] = work

    for stage, channels in enumerate(dims):
        if stage:
            positions //= 4
            before, size = dims[stage - 1], vision["down_patch_size"]
            down = depthwise(positions, before, size, stride=2, outputs=channels // before)
            add(down + linear(positions, channels, channels))
        if shape := vision["pos_embs_shapes"][stage]:
            add(depthwise(positions, channels, shape[0]))
        add(_fastvit_block(vision, stage, positions).layers(vision["layers"][stage]))
    out = int(dims[-1] * vision["cls_ratio"])
    modules["conv_exp"] = (
        depthwise(positions, dims[-1], 3, outputs=out // dims[-1])
        + linear(1, out, out // _SQUEEZE)
        + linear(1, out // _SQUEEZE, out)
    )
    return modules


def _fastvit_block(vision: Mapping[str, Any], stage: int, positions: int) -> Work:
    channels = vision["embed_dims"][stage]
    hidden = int(channels * vision["mlp_ratios"][stage])
    ffn = (
        depthwise(positions, channels, 7)
        + Work(vectors=-channels)  # its bias is folded into the next layer
        + linear(positions, channels, hidden)
        + linear(positions, hidden, channels)
    )
    if vision["token_mixers"][stage] != "attention":
        return ffn + depthwise(positions, channels, vision["repmixer_kernel_size"])
    return (
        ffn
        + norm(positions, channels)
        + linear(positions, channels, 3 * channels, bias=False)
        + attention(positions, channels)
        + linear(positions, channels, channels)
    )


def vit(vision: Mapping[str, Any], layers: int, *, post_norm: bool = False) -> Work:
    """A CLIP or SigLIP tower up to its `layers`-th layer, on a tile of its own size."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    class_token = _LINES.get(vision.get("model_type", "clip_vision_model"), False)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    rows = patches + class_token
    layer = (
        norm(rows, width).layers(2)
        + linear(rows, width, 3 * width)
        + attention(rows, width)
        + linear(rows, width, width)
        + linear(rows, width, inner)
        + linear(rows, inner, width)
    )
    embedding = linear(patches, 3 * vision["patch_size"] ** 2, width, bias=not class_token)
    tables = Work(vectors=(rows + class_token) * width)
    norms = norm(rows, width).layers(class_token + post_norm)
    return embedding + tables + norms + layer.layers(layers)


def eve(channels: int, patch: int, window: int, height: int, width: int) -> Work:
    """EVE v1's patch embedding: a convolution, then two cross-attentions with one query each per
    window and per picture."""
    patches = (height // patch) * (width // patch)
    windows = patches // window**2
    embedding = linear(patches, 3 * patch**2, channels, bias=False)
    tokens = Work(vectors=2 * channels)  # class and split embedding
    return embedding + tokens + _cross(windows, patches, channels) + _cross(1, windows, channels)


def _cross(queries: int, keys: int, channels: int) -> Work:
    """One query per group; a key meets its own group's query only."""
    return (
        norm(queries, channels)
        + norm(keys, channels)
        + linear(queries, channels, channels, bias=False)
        + linear(keys, channels, 2 * channels, bias=False)
        + attention(queries, channels, keys=keys, pairs=keys)
        + linear(queries, channels, channels)
    )


def eve2(channels: int, hidden: int, patch: int, window: int, height: int, width: int) -> Work:
    """EVE v2's patch embedding: two convolutions to the decoder's width."""
    patches = math.prod(side // patch for side in (height, width))
    tokens = Work(vectors=2 * hidden)  # class and split embedding
    made = linear(patches // window**2, channels * window**2, hidden)
    return linear(patches, 3 * patch**2, channels) + made + tokens
