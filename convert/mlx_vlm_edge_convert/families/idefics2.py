"""Idefics2 checkpoints -> the native (mlx-vlm) layout.

All published ones have transformers' names (`model.vision_model.*`, `model.connector.*`,
`model.text_model.*`), the same in every release.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.configs.defaults import IDEFICS2_VISION
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.idefics2 import is_native
from mlx_vlm_edge.models.idefics2_config import Config
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.wording import some

from ..rules import Arrays, Rule, apply
from ..save import complete_json
from .decoder import EMBEDDING, decoder_rules, settle_head
from .vit import tower_rules

_SWIGLU = r"(?:gate|up|down)_proj\.weight"
_LAYER = (
    r"(?:input_latents_norm|input_context_norm|post_attention_layernorm)\.weight"
    rf"|self_attn\.[qkvo]_proj\.weight|mlp\.{_SWIGLU}"
)
_CONNECTOR = (
    rf"connector\.(?:modality_projection\.{_SWIGLU}"
    rf"|perceiver_resampler\.(?:latents|norm\.weight|layers\.\d+\.(?:{_LAYER})))"
)
_TRANSFORMERS = (
    *tower_rules("model.vision_model.", "vision_model."),
    Rule(rf"model\.({_CONNECTOR})", r"\1"),
    *decoder_rules("model.text_model."),
)
# mlx-vlm's decoder has no `model.` in its names.
_TO_NATIVE = (
    Rule(r"language_model\.model\.(.*)", r"language_model.\1"),
    Rule(r"(.*)", r"\1"),
)

config_alone = dict  # the published config.json has the native words


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return _TRANSFORMERS


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """The native config and weights of a published checkpoint.

    Raises UsageError when names, shapes and config disagree.
    """
    if is_native(weights):
        return dict(config), dict(weights)
    if not any(name.startswith("model.text_model.") for name in weights):
        raise UsageError(f"no Idefics2 layout has names such as {some(weights)}")
    renamed = apply(_TRANSFORMERS, weights, "transformers' Idefics2 layout")
    if EMBEDDING not in renamed:
        raise UsageError("the checkpoint has no complete Idefics2: shards may be missing")
    tied = settle_head(renamed, says_tied(config))
    native = {
        **config,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "mistral",
            "vocab_size": renamed[EMBEDDING].shape[0],
            **(config.get("text_config") or {}),
        },
        "vision_config": {**IDEFICS2_VISION, **(config.get("vision_config") or {})},
    }
    return native, apply(_TO_NATIVE, renamed, "Idefics2")


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Complete preprocessor_config.json and processor_config.json as peers read them."""
    parsed = Config.from_dict(config)
    pixels = {
        "do_convert_rgb": True,
        "do_image_splitting": parsed.strategy == "split",
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": parsed.longest_edge, "shortest_edge": parsed.shortest_edge},
    }
    named = {"processor_class": "Idefics2Processor"}
    complete_json(folder / PREPROCESSOR_CONFIG, pixels, named)
    complete_json(folder / PROCESSOR_CONFIG, {"image_seq_len": parsed.perceiver.latents}, named)


def probe(config: Mapping[str, Any]) -> Pixels:
    """One small piece of noise for `--verify`."""
    side = Config.from_dict(config).shortest_edge
    data = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    return Pixels(data, (side, side))
