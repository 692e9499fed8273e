"""EVE v1.0 checkpoints -> the native layout: the published names without `model.`, NHWC.

What the training alone needed is left out: the CLIP teacher and the layer that aligned with it.
The preprocessor's file, where someone has put it beside the weights, goes into the config.
Source: baaivision/EVE, EVEv1, eve/model/eve_arch.py, eve/model/multimodal_encoder.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG
from mlx_vlm_edge.models import eve
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.vision.pixels import CLIP_MEAN, CLIP_STD

from ..rules import Arrays, Rule, apply, to_channels_last
from ..save import complete_json
from .decoder import decoder_rules, settle_head

PIXELS = ("image_size", "image_size_clip", "patch_stride", "conv_stride")
_WB = "(?:weight|bias)"
_ATTENTION = rf"(?:q|kv)\.0\.{_WB}|(?:q|kv)\.1\.weight|proj\.{_WB}"

TRAINING_ONLY = (
    Rule(r"model\.vision_clip\..*", None, why="the CLIP teacher of EVE's training"),
    Rule(
        r"model\.vision_tower_compressor\..*",
        None,
        why="the patch aligning layer, which only the training's loss reads",
    ),
)
RULES = (
    *TRAINING_ONLY,
    Rule(r"model\.(vision_tower\.patch_embedding\.weight)", r"\1", to_channels_last),
    Rule(r"model\.(vision_tower\.(?:class|split)_embedding)", r"\1"),
    Rule(rf"model\.(vision_tower\.(?:local|global)_attention\.(?:{_ATTENTION}))", r"\1"),
    Rule(rf"model\.(mm_projector\.[02]\.{_WB})", r"\1"),
    *decoder_rules("model."),
)


def rename(weights: Mapping[str, mx.array]) -> Arrays:
    """Published names -> native ones, lazily. Raises UsageError for a name without a rule."""
    return dict(weights) if eve.is_native(weights) else apply(RULES, weights, "EVE's layout")


config_alone = dict  # the published config.json has the native words


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return RULES


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """The native config and weights of a published checkpoint; see `with_pixels`."""
    native = rename(weights)
    tied = settle_head(native, says_tied(config))
    return with_pixels(config, preprocessor, PIXELS) | {"tie_word_embeddings": tied}, native


def with_pixels(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, keys: Iterable[str]
) -> dict[str, Any]:
    """The config with what the preprocessor's file says of `keys`.

    The published repositories lack that file: the runtime then has the constants.
    """
    return {**config, **{key: value for key, value in (preprocessor or {}).items() if key in keys}}


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """preprocessor_config.json as the original's code reads it, which the source may lack."""
    parsed = eve.Config.from_dict(config)
    size = parsed.image_size
    own = {
        "crop_size": size,
        "size": size,
        "image_size": size,
        "image_size_clip": size // parsed.ratio,
        "patch_stride": parsed.vision.patch,
        "patch_stride_clip": parsed.vision.patch,
        "conv_stride": parsed.vision.window,
    }
    complete_json(folder / PREPROCESSOR_CONFIG, clip_pixels() | own, {})


def clip_pixels() -> dict[str, Any]:
    """What both versions' preprocessor_config.json have: no resizing there, CLIP's mean and std."""
    return {
        "do_center_crop": False,
        "do_normalize": True,
        "do_resize": False,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
    }


def probe(config: Mapping[str, Any]) -> Pixels:
    """A small random picture of 2 x 3 tokens for `--verify`."""
    return random_pixels(eve.Config.from_dict(config).vision.stride)


def random_pixels(stride: int) -> Pixels:
    """2 x 3 tokens of `stride` x `stride` pixels."""
    shape = (2 * stride, 3 * stride, 3)
    data = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Pixels(data, (shape[1], shape[0]))
