"""LLaVA-1.5 checkpoints -> the native (mlx-vlm) layout.

Published as the original repository's (whose vision tower is mostly left out, since it is OpenAI's
unchanged), as transformers' on the Hub, and as transformers 5 holds it in memory.
Sources: haotian-liu/LLaVA; transformers, models/llava/convert_llava_weights_to_hf.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.configs.defaults import LLAMA
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.llama import KEYS
from mlx_vlm_edge.models.llava import KEEPS_CLASS_TOKEN, is_native
from mlx_vlm_edge.vision.pixels import CLIP, SIGLIP
from mlx_vlm_edge.vision.vit import KINDS
from mlx_vlm_edge.wording import some

from ..rules import Arrays, Rule, apply
from ..save import clip_preprocessor, complete_json
from .clip import complete, fetch_tower, published_tower
from .clip import probe as probe
from .decoder import decoder_rules, settle_head
from .spellings import CONNECTOR, transformers_rules
from .vit import TOWER, tower_rules

Config = dict[str, Any]

ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."
_PROJECTORS = ("mlp2x_gelu",)
_WB = r"(?:weight|bias)"


def original_rules(tower: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The original repository's names, around its tower's."""
    return (
        *tower,
        Rule(rf"model\.mm_projector\.0\.({_WB})", rf"{CONNECTOR}linear_1.\1"),
        Rule(rf"model\.mm_projector\.2\.({_WB})", rf"{CONNECTOR}linear_2.\1"),
        *decoder_rules("model."),
    )


def rename(weights: Mapping[str, mx.array]) -> Arrays:
    """Any published layout -> native names and tensor layouts, without a tower where it has none.

    Raises UsageError for an unknown layout and for names without a rule.
    """
    if is_native(weights):
        return dict(weights)
    if any(name.startswith("model.mm_projector.") for name in weights):
        return apply(original_rules(tower_rules(ORIGINAL_TOWER)), weights, "LLaVA's layout")
    if any(CONNECTOR in name for name in weights):
        return apply(transformers_rules(), weights, "transformers' LLaVA layout")
    raise UsageError(f"no LLaVA layout has names such as {some(weights)}")


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return (*original_rules(tower_rules(ORIGINAL_TOWER)), *transformers_rules())


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[Config, Arrays]:
    """The native config and weights of a published LLaVA-1.5 checkpoint.

    A tower that is not in it is taken from the model its config names, which must be on this
    machine. Raises UsageError when names, shapes and config disagree.
    """
    native = rename(weights)
    nested = "text_config" in config
    translated = from_transformers(config) if nested else from_original(config)
    translated["vision_config"] = place_tower(translated, native)
    translated["tie_word_embeddings"] = settle_head(native, says_tied(translated))
    return translated, native


def config_alone(config: Mapping[str, Any]) -> Config:
    """The native config of a published one without weights: an unnamed tower is OpenAI's."""
    nested = config.get("text_config") is not None
    native = from_transformers(config) if nested else from_original(config)
    return {**native, "vision_config": published_tower(config)}


def place_tower(config: Mapping[str, Any], native: Arrays) -> Config:
    """The native `vision_config`, and the tower put among the weights where they lack it."""
    stated = config.get("vision_config") or {}
    if not any(name.startswith(TOWER) for name in native):
        published, tower = fetch_tower(config)
        native |= tower
        stated = {**published, **stated}
    return complete(stated, native, str(config.get("mm_vision_tower", "")))


def from_original(config: Mapping[str, Any]) -> Config:
    """A flat config: the text fields into text_config, LLaVA's words into transformers'."""
    check_original(config)
    projector = config.get("mm_projector_type", "linear")
    if projector not in _PROJECTORS:
        raise UsageError(f"config.json: mm_projector_type {projector!r} is not known")
    merge = config.get("mm_patch_merge_type") or "flat"
    if merge != "flat":
        raise UsageError(f"config.json: mm_patch_merge_type {merge!r} is not known")
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in KEEPS_CLASS_TOKEN:
        raise UsageError(f"config.json: mm_vision_select_feature {feature!r} is not known")
    text = {key: config[key] for key in KEYS if key in config}
    return {
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "image_token_index": -200,
        "projector_hidden_act": "gelu",
        **config,
        "model_type": "llava",
        "text_config": {"model_type": "llama", **LLAMA, **text},
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if KEEPS_CLASS_TOKEN[feature] else "default",
    }


def check_original(config: Mapping[str, Any]) -> None:
    """Raises UsageError for what the original code can be told and this one cannot do."""
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if config.get(key):
            raise UsageError(f"config.json: {key} is set, a prompt format that is not supported")


def from_transformers(config: Mapping[str, Any]) -> Config:
    """A nested config; what is done to pictures stands in the preprocessor's file."""
    return {
        "tie_word_embeddings": False,
        "image_token_index": config.get("image_token_id", 32000),
        **config,
        "model_type": "llava",
        "text_config": {"model_type": "llama", **LLAMA, **config["text_config"]},
    }


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Complete preprocessor_config.json and processor_config.json for transformers and mlx-vlm."""
    vision = config["vision_config"]
    clip = KINDS[vision["model_type"]].class_token
    mean, std, _ = CLIP if clip else SIGLIP
    pixels = clip_preprocessor(vision["image_size"], mean, std)
    complete_json(folder / PREPROCESSOR_CONFIG, pixels, {})
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": int(clip),
        "patch_size": vision["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    complete_json(folder / PROCESSOR_CONFIG, processor, {})
