"""EVE v2.0 checkpoints -> the native layout: the published names without `model.`, NHWC.

Every decoder layer has a second set of weights, for visual tokens, under `moe_`.
Source: baaivision/EVE, EVEv2, eve/model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG
from mlx_vlm_edge.models import eve2
from mlx_vlm_edge.picture.image import Pixels

from ..rules import Arrays, Rule, apply, to_channels_last
from ..save import complete_json
from . import eve
from .decoder import decoder_rules, settle_head

PIXELS = ("max_size", "patch_stride", "dense_stride")
_VISUAL = (
    r"self_attn\.moe_(?:[qkv]_proj\.(?:weight|bias)|o_proj\.weight)"
    r"|moe_mlp\.(?:gate|up|down)_proj\.weight"
    r"|moe_(?:input|post_attention)_layernorm\.weight"
)
RULES = (
    Rule(r"model\.(vision_tower\.patch_embedding\.[02]\.weight)", r"\1", to_channels_last),
    Rule(r"model\.(vision_tower\.patch_embedding\.[02]\.bias)", r"\1"),
    Rule(r"model\.(vision_tower\.(?:class|split)_embedding)", r"\1"),
    # what the repository's code calls the class token in some of its revisions
    Rule(r"model\.vision_tower\.start_embedding", "vision_tower.class_embedding"),
    Rule(rf"model\.(layers\.\d+\.(?:{_VISUAL}))", r"language_model.model.\1"),
    *decoder_rules("model."),
)


def rename(weights: Mapping[str, mx.array]) -> Arrays:
    """Published names -> native ones, lazily. Raises UsageError for a name without a rule."""
    return (
        dict(weights)
        if eve2.FAMILY.is_native(weights)
        else apply(RULES, weights, "EVE v2's layout")
    )


config_alone = dict  # the published config.json has the native words


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return RULES


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """The native config and weights of a published checkpoint; see `eve.with_pixels`."""
    native = rename(weights)
    tied = settle_head(native, says_tied(config))
    return eve.with_pixels(config, preprocessor, PIXELS) | {"tie_word_embeddings": tied}, native


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """preprocessor_config.json as the original's code reads it, which the source may lack."""
    parsed = eve2.Config.from_dict(config)
    own = {
        "max_size": parsed.image_size,
        "patch_stride": parsed.vision.patch,
        "dense_stride": parsed.vision.window,
    }
    complete_json(folder / PREPROCESSOR_CONFIG, eve.clip_pixels() | own, {})


def probe(config: Mapping[str, Any]) -> Pixels:
    """A small random picture of 2 x 3 tokens for `--verify`."""
    return eve.random_pixels(eve2.Config.from_dict(config).vision.stride)
