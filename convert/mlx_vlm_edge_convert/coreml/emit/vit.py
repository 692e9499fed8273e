"""CLIP and SigLIP as MIL: [1, 3, H, W] pixels of 0..255 -> hidden states [1, C, 1, N].

The class token, where there is one, comes first. Site: `stream`, all of the residual stream.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.vision.vit import (
    ACTIVATIONS,
    Attention,
    Layer,
    PatchEmbedding,
    ViT,
    ViTConfig,
)

from .network import Network, Value, affine_folded, attention, image_folded, numpy

SITE = "stream"


def emit(
    net: Network,
    tower: ViT,
    config: ViTConfig,
    image: Value,
    mean: Sequence[float],
    std: Sequence[float],
    positions: np.ndarray | None = None,
) -> Value:
    """positions: rows of the position embedding where they are not simply 0..N-1."""
    table = numpy(tower.position_embedding)
    table = table if positions is None else table[positions]
    first = tower.class_embedding if config.class_token else None
    site = None if config.class_token else SITE  # CLIP's norm comes before its stream
    x = embedding(net, tower.patch_embedding, first, image, table, mean, std, site)
    if config.class_token:
        norm = tower.pre_layernorm
        bare = net.norm(x, config.layer_norm_eps, "pre_norm")
        x = net.affine(bare, numpy(norm.weight), numpy(norm.bias), "pre_norm_affine", SITE)
    for index, layer in enumerate(tower.layers):
        x = _layer(net, layer, config, x, f"layer{index}")
    if config.post_norm:
        norm = tower.post_layernorm
        bare = net.norm(x, config.layer_norm_eps, "post_norm")
        x = net.affine(bare, numpy(norm.weight), numpy(norm.bias), "post_norm_affine")
    return x


def embedding(
    net: Network,
    patches: PatchEmbedding,
    first: mx.array | None,
    image: Value,
    table: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    site: str | None,
) -> Value:
    """Patches and position embedding, in front of them a class token: [1, D, 1, N]."""
    patch, p, D = patches.proj, patches.size, table.shape[1]
    weight = numpy(patch.weight).reshape(D, p, p, 3).transpose(0, 3, 1, 2)
    own = numpy(patch.bias) if "bias" in patch else None
    weight, bias = image_folded(weight, own, mean, std)
    x = net.conv(image, weight, bias, "patches", site, stride=p)
    x = net.reshape(x, (1, D, 1, x.shape[2] * x.shape[3]), "patches_row")
    if first is not None:
        power = net.powers.get(site, 0) if site else 0
        token = net.const(numpy(first).reshape(1, D, 1, 1) * 2.0**-power)
        x = net.concat([Value(token, power, site), x], 3, "with_class_token")
    return net.add_const(x, np.ascontiguousarray(table.T)[None, :, None], "positions")


def _layer(net: Network, layer: Layer, config: ViTConfig, x: Value, name: str) -> Value:
    eps = config.layer_norm_eps
    x = attended(net, layer.layer_norm1, layer.self_attn, x, name)
    weight, bias = behind(layer.layer_norm2, layer.fc1)
    y = net.linear(net.norm(x, eps, f"{name}_norm2"), weight, bias, f"{name}_fc1")
    y = net.activation(y, _activation(config), f"{name}_activation")
    y = net.linear(y, numpy(layer.fc2.weight), numpy(layer.fc2.bias), f"{name}_fc2", SITE)
    return net.add(x, y, name)


def attended(net: Network, norm: nn.LayerNorm, attend: Attention, x: Value, name: str) -> Value:
    """A layer's first half: attention behind its norm, added to what came in."""
    weight, bias = behind(norm, attend.qkv)
    D = weight.shape[1]
    scale = (D // attend.heads) ** -0.5
    weight[:D] *= scale
    bias[:D] *= scale
    qkv = net.linear(net.norm(x, norm.eps, f"{name}_norm1"), weight, bias, f"{name}_qkv")
    y = attention(net, qkv, attend.heads, f"{name}_attention")
    out = attend.out_proj
    y = net.linear(y, numpy(out.weight), numpy(out.bias), f"{name}_proj", SITE)
    return net.add(x, y, f"{name}_attended")


def behind(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    """A linear layer with the gain and offset of the norm before it folded in."""
    parts = (linear.weight, linear.bias, norm.weight, norm.bias)
    weight, bias, gain, offset = (numpy(part) for part in parts)
    return affine_folded(weight, bias, gain, offset)


def _activation(config: ViTConfig) -> str:
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(config.hidden_act)
    return config.hidden_act
