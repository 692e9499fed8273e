"""MoE-LLaVA checkpoints -> the native layout: LLaVA's tower and connector, and the language model
under its published names, DeepSpeed's of the experts included.

The gates lose their `.weight`: they choose in float32 and are never quantised. The embedded tower
is used, which the original's loader puts OpenAI's or Google's in the place of.
Source: PKU-YuanGroup/MoE-LLaVA, moellava/model/llava_arch.py, builder.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.llava import is_native
from mlx_vlm_edge.models.llava_onevision import SIGLIP
from mlx_vlm_edge.vision.pixels import CLIP_MEAN, CLIP_STD

from ..rules import Arrays, Rule, apply
from ..save import clip_preprocessor, complete_json
from .clip import complete, published_tower
from .clip import probe as probe
from .llava import check_original
from .spellings import CONNECTOR
from .vit import TOWER, tower_rules

Config = dict[str, Any]

_WB = r"(?:weight|bias)"
_MODEL = r"(?:model|transformer)\."
_EXPERT = r"(?:deepspeed_moe\.experts\.deepspeed_experts\.\d+\.)?"
_STABLELM = (
    rf"(?:input|post_attention)_layernorm\.{_WB}"
    rf"|self_attn\.(?:[qkv]_proj\.{_WB}|o_proj\.weight)|mlp\.{_EXPERT}(?:gate|up|down)_proj\.weight"
)
_PHI = rf"self_attn\.dense\.{_WB}|mlp\.{_EXPERT}fc[12]\.{_WB}"  # and names of StableLM's
_QWEN = (
    rf"ln_[12]\.weight|attn\.c_attn\.{_WB}|attn\.c_proj\.weight"
    rf"|mlp\.{_EXPERT}(?:w1|w2|c_proj)\.weight"
)
_SIGLIP_NAME, _SIGLIP_LAYERS = "siglip-so400m-patch14-384", 27


def rules() -> tuple[Rule, ...]:
    """The published names of all three."""
    towers = (f"{base}.image_tower.image_tower.vision_model." for base in ("model", "transformer"))
    gate = r"\.mlp\.deepspeed_moe\.gate\.wg"
    return (
        *(rule for prefix in towers for rule in tower_rules(prefix)),
        Rule(rf"{_MODEL}mm_projector\.image_spatial_proj\.0\.({_WB})", rf"{CONNECTOR}linear_1.\1"),
        Rule(rf"{_MODEL}mm_projector\.image_spatial_proj\.2\.({_WB})", rf"{CONNECTOR}linear_2.\1"),
        Rule(rf"({_MODEL}(?:layers|h)\.\d+{gate})\.weight", r"language_model.\1"),
        Rule(rf"(model\.layers\.\d+\.(?:{_STABLELM}|{_PHI}))", r"language_model.\1"),
        Rule(rf"(transformer\.h\.\d+\.(?:{_QWEN}))", r"language_model.\1"),
        Rule(
            rf"(model\.embed_tokens\.weight|model\.(?:final_layer)?norm\.{_WB}"
            r"|transformer\.(?:wte|ln_f)\.weight|lm_head\.weight)",
            r"language_model.\1",
        ),
        Rule(r".*\.rotary_emb\.inv_freq", None, why="a table computed from the rotary base"),
    )


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change: DeepSpeed's experts and gates among them."""
    return rules()


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[Config, Arrays]:
    """The native config and weights of a published MoE-LLaVA checkpoint.

    Raises UsageError when names, shapes and config disagree.
    """
    native = dict(weights) if is_native(weights) else apply(rules(), weights, "MoE-LLaVA's layout")
    check_original(config)
    if not any(name.startswith(TOWER) for name in native):
        raise UsageError("the checkpoint has no vision tower; take one that was saved whole")
    vision = _vision(config)
    if vision.get("model_type") == "siglip_vision_model":
        return {**_translated(config), "vision_config": vision}, native
    tower = complete(config.get("vision_config") or {}, native, _tower_name(config))
    return {**_translated(config), "vision_config": tower}, native


def config_alone(config: Mapping[str, Any]) -> Config:
    """The native config of a published one without weights."""
    return {**_translated(config), "vision_config": _vision(config)}


def _translated(config: Mapping[str, Any]) -> Config:
    return {"image_token_index": -200, **config, "tie_word_embeddings": False}


def _tower_name(config: Mapping[str, Any]) -> str:
    return str(config.get("mm_image_tower"))


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config says of its tower, or what is published under the name it gives."""
    if not config.get("vision_config") and _tower_name(config).endswith(_SIGLIP_NAME):
        return {**SIGLIP, "num_hidden_layers": _SIGLIP_LAYERS}
    return published_tower({**config, "mm_vision_tower": config.get("mm_image_tower")})


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """preprocessor_config.json, which no published MoE-LLaVA has: CLIP's constants."""
    vision = config["vision_config"]
    if vision.get("model_type") != "siglip_vision_model":
        size = vision["image_size"]
        complete_json(
            folder / PREPROCESSOR_CONFIG, clip_preprocessor(size, CLIP_MEAN, CLIP_STD), {}
        )
