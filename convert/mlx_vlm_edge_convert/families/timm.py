"""Towers that open_clip publishes under timm's names -> transformers' names, NHWC.

`visual.trunk.` is the tower; the text's side and the pooling behind the tower are left out.
Sources: huggingface/pytorch-image-models, timm/models/vision_transformer.py and convnext.py;
mlfoundations/open_clip.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..rules import Arrays, Rule, to_channels_last

TRUNK = "visual.trunk."
_WB = r"(?:weight|bias)"
_T = r"visual\.trunk\."
_BLOCK = rf"{_T}blocks\.(\d+)\."
_STAGE = rf"{_T}stages\.(\d+)\."
_REST = (
    Rule(
        rf"{_T}(?:attn_pool|head)\..*|visual\.head\..*",
        None,
        why="what pools a picture to one vector; features are read before it",
    ),
    Rule(r"(?!visual\.).*", None, why="CLIP's text side and the scale of their common space"),
)


def _first(array: mx.array) -> mx.array:
    """[1, N, D] -> [N, D]."""
    return array[0]


def vit_rules(target: str) -> tuple[Rule, ...]:
    """A vision transformer without class token, its q, k and v apart (`with_qkv_apart`)."""
    layer = rf"{target}encoder.layers.\1."
    embeddings = f"{target}embeddings."
    return (
        Rule(rf"{_T}pos_embed", f"{embeddings}position_embedding.weight", _first),
        Rule(
            rf"{_T}patch_embed\.proj\.weight",
            f"{embeddings}patch_embedding.weight",
            to_channels_last,
        ),
        Rule(rf"{_T}patch_embed\.proj\.bias", f"{embeddings}patch_embedding.bias"),
        Rule(rf"{_BLOCK}norm([12])\.({_WB})", rf"{layer}layer_norm\2.\3"),
        Rule(rf"{_BLOCK}attn\.([qkv])\.({_WB})", rf"{layer}self_attn.\2_proj.\3"),
        Rule(rf"{_BLOCK}attn\.proj\.({_WB})", rf"{layer}self_attn.out_proj.\2"),
        Rule(rf"{_BLOCK}(mlp\.fc[12]\.{_WB})", rf"{layer}\2"),
        Rule(rf"{_T}norm\.({_WB})", rf"{target}post_layernorm.\1"),
        *_REST,
    )


def with_qkv_apart(weights: Mapping[str, mx.array]) -> Arrays:
    """The weights with each `attn.qkv` as `attn.q`, `attn.k` and `attn.v`."""
    apart: Arrays = {}
    for name, array in weights.items():
        if name.startswith(TRUNK) and ".attn.qkv." in name:
            for x, part in zip("qkv", mx.split(array, 3), strict=True):
                apart[name.replace(".attn.qkv.", f".attn.{x}.")] = part
        else:
            apart[name] = array
    return apart


def convnext_rules(target: str) -> tuple[Rule, ...]:
    stage, block = rf"{target}encoder.stages.\1.", rf"{target}encoder.stages.\1.layers.\2."
    embeddings, blocks = f"{target}embeddings.", rf"{_STAGE}blocks\.(\d+)\."
    return (
        Rule(rf"{_T}stem\.0\.weight", f"{embeddings}patch_embeddings.weight", to_channels_last),
        Rule(rf"{_T}stem\.0\.bias", f"{embeddings}patch_embeddings.bias"),
        Rule(rf"{_T}stem\.1\.({_WB})", rf"{embeddings}layernorm.\1"),
        Rule(
            rf"{_STAGE}downsample\.1\.weight",
            f"{stage}downsampling_layer.1.weight",
            to_channels_last,
        ),
        Rule(rf"{_STAGE}downsample\.(0\.{_WB}|1\.bias)", rf"{stage}downsampling_layer.\2"),
        Rule(rf"{blocks}conv_dw\.weight", f"{block}dwconv.weight", to_channels_last),
        Rule(rf"{blocks}conv_dw\.bias", f"{block}dwconv.bias"),
        Rule(rf"{blocks}norm\.({_WB})", rf"{block}layernorm.\3"),
        Rule(rf"{blocks}mlp\.fc([12])\.({_WB})", rf"{block}pwconv\3.\4"),
        Rule(rf"{blocks}gamma", f"{block}layer_scale_parameter"),
        *_REST,
    )
