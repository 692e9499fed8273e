"""LLaVA-OneVision checkpoints -> the native (mlx-vlm) layout, which is transformers' but for NHWC.

Published as the original one (`model.mm_projector.*`, a flat config) and as transformers', in all
its spellings.
Source: transformers, models/llava_onevision/convert_llava_onevision_weights_to_hf.py.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.llama import KEYS
from mlx_vlm_edge.models.llava_onevision import (
    PATCHES,
    SIGLIP,
    VISION,
    default_pinpoints,
    is_native,
)
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.wording import some

from ..rules import Arrays, Rule, apply
from ..save import complete_json
from .decoder import decoder_rules, settle_head
from .spellings import CONNECTOR, transformers_rules
from .vit import tower_rules

Config = dict[str, Any]

TOWER_NAME = "siglip-so400m-patch14-384"
_WB = "(?:weight|bias)"
_NEWLINE = Rule(r"(?:model\.)?image_newline", "image_newline")
# Fields of a flat config that are the decoder's; the rest stays at the root.
_TEXT = (*KEYS, "attention_dropout", "initializer_range")
_FLAT = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_select_feature": "patch",
}


def _original_rules() -> tuple[Rule, ...]:
    connector = r"model\.mm_projector\."
    return (
        _NEWLINE,
        *tower_rules("model.vision_tower.vision_tower.vision_model."),
        Rule(rf"{connector}0\.({_WB})", r"multi_modal_projector.linear_1.\1"),
        Rule(rf"{connector}2\.({_WB})", r"multi_modal_projector.linear_2.\1"),
        *decoder_rules("model."),
    )


def rename(weights: Mapping[str, mx.array]) -> Arrays:
    """Any published layout -> native names and tensor layouts. Lazy.

    Raises UsageError for an unknown layout and for names without a rule.
    """
    if is_native(weights):
        return dict(weights)
    if "model.mm_projector.0.weight" in weights:
        return apply(_original_rules(), weights, "LLaVA-OneVision's original layout")
    if any(CONNECTOR in name for name in weights):
        rules = (_NEWLINE, *transformers_rules())
        return apply(rules, weights, "transformers' llava_onevision layout")
    raise UsageError(f"no LLaVA-OneVision layout has names such as {some(weights)}")


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return (*_original_rules(), *transformers_rules())


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[Config, Arrays]:
    """The native config and weights of a published LLaVA-OneVision checkpoint.

    Raises UsageError when names, shapes and config disagree.
    """
    native = rename(weights)
    if PATCHES not in native:
        raise UsageError("the checkpoint has no vision tower; take one that was saved whole")
    tied = settle_head(native, says_tied(config))
    translated = nested(config) if "text_config" not in config else dict(config)
    text = {**translated["text_config"], "tie_word_embeddings": tied}
    eos = translated.get("eos_token_id", text.get("eos_token_id"))
    translated |= {"text_config": text, "tie_word_embeddings": tied, "eos_token_id": eos}
    vision = _vision(translated.get("vision_config") or {}, native)
    translated["vision_config"] = vision
    if translated.get("image_grid_pinpoints") is None:
        translated["image_grid_pinpoints"] = default_pinpoints(vision["image_size"])
    return translated, native


def nested(config: Mapping[str, Any]) -> Config:
    """A flat config of the original code as transformers' nested one; every key is kept.

    Grids are listed as (width, height) there. The layer it names, -2, is not what its code reads:
    that is the last of the layers it stores.
    """
    for key, value in _FLAT.items():
        if config.get(key, value) != value:
            raise UsageError(f"config.json: {key} {config[key]!r} is not known")
    tower = str(config.get("mm_vision_tower") or TOWER_NAME)
    if TOWER_NAME not in tower:
        raise UsageError(f"config.json: mm_vision_tower {tower!r} is not {TOWER_NAME}")
    pinpoints = config.get("image_grid_pinpoints")
    if pinpoints is not None and not isinstance(pinpoints, list):
        raise UsageError("config.json: image_grid_pinpoints is no list of [width, height]")
    text = {key: config[key] for key in _TEXT if key in config}
    root = {key: value for key, value in config.items() if key not in text}
    return {
        **root,
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": pinpoints and [[height, width] for width, height in pinpoints],
        "image_token_index": config.get("image_token_index", 151646),
        "projector_hidden_act": "gelu",
        "text_config": {**text, "model_type": "qwen2"},
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": config.get("image_aspect_ratio", "anyres_max_9"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _vision(given: Mapping[str, Any], weights: Mapping[str, mx.array]) -> Config:
    """`vision_config` with what it leaves out; what it says must agree with the weights."""
    vision = {**SIGLIP, "vision_use_head": False, **given}
    width, patch, *_ = weights[PATCHES].shape
    norms = [name for name in weights if name.endswith(".layer_norm1.weight")]
    grid = math.isqrt(weights[f"{VISION}embeddings.position_embedding.weight"].shape[0])
    derived = {
        "hidden_size": width,
        "intermediate_size": weights[f"{VISION}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(norms),
        "patch_size": patch,
    }
    for key, value in derived.items():
        if vision[key] != value:
            raise UsageError(
                f"vision_config says {key} {vision[key]}, but the weights have {value}"
            )
    if vision["image_size"] // patch != grid:
        raise UsageError(
            f"vision_config says image_size {vision['image_size']}, but the weights have "
            f"{grid} x {grid} positions of {patch} pixels"
        )
    return vision


def config_alone(config: Mapping[str, Any]) -> Config:
    """The native config of a published one without weights."""
    return dict(config) if config.get("text_config") else nested(config)


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Complete preprocessor_config.json and processor_config.json as llava-hf writes them."""
    side, patch = (config["vision_config"][key] for key in ("image_size", "patch_size"))
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": [0.5] * 3,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    processor = {
        "image_token": "<image>",
        "num_image_tokens": (side // patch) ** 2,
        "vision_aspect_ratio": config.get("vision_aspect_ratio", "anyres_max_9"),
        "vision_feature_select_strategy": "full",
    }
    kind = {"processor_class": "LlavaOnevisionProcessor"}
    complete_json(folder / PREPROCESSOR_CONFIG, pixels, kind)
    complete_json(folder / PROCESSOR_CONFIG, processor, kind)


def probe(config: Mapping[str, Any]) -> Pixels:
    """A random image of the smallest size for `--verify`: the whole and one tile."""
    side = config["vision_config"]["image_size"]
    data = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    return Pixels(data, (side, side))
