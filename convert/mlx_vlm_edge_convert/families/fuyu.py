"""Fuyu checkpoints -> the native layout, which is the published one.

transformers 5 saves the same weights under other prefixes, with the decoder's keys of config.json
in `text_config`; there they may stay.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG
from mlx_vlm_edge.models import fuyu
from mlx_vlm_edge.picture.image import Pixels

from ..rules import Arrays, Rule, apply
from ..save import complete_json

PROBE_PATCHES = 3, 4  # rows and columns of the image that `--verify` runs

_WB = "(?:weight|bias)"
_LAYER = (
    rf"self_attn\.(?:query_key_value|dense|[qk]_layernorm)\.{_WB}"
    rf"|mlp\.dense_(?:h_to_4h|4h_to_h)\.{_WB}|(?:input|post_attention)_layernorm\.{_WB}"
)
_DECODER = r"model\.language_model\.(?:model\.)?"  # with the second model. in 5.4 and 5.5
_TRANSFORMERS = (
    Rule(
        rf"{_DECODER}(layers\.\d+\.(?:{_LAYER})|final_layernorm\.{_WB})",
        r"language_model.model.\1",
    ),
    Rule(rf"{_DECODER}(embed_tokens\.weight)", r"language_model.model.\1"),
    Rule(r"(?:language_model\.)?(lm_head\.weight)", r"language_model.\1"),
    Rule(rf"model\.(vision_embed_tokens\.{_WB})", r"\1"),
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
    """The native config and weights of a published Fuyu checkpoint.

    `preprocessor` is not read here: it has the native words.
    Raises UsageError for names without a rule.
    """
    if fuyu.is_native(weights):
        return dict(config), dict(weights)
    return dict(config), apply(_TRANSFORMERS, weights, "transformers' fuyu layout")


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Complete preprocessor_config.json as transformers' FuyuImageProcessor writes it."""
    parsed = fuyu.Config.from_dict(config)
    patch, (width, height) = parsed.patch_size, parsed.image_size
    published = {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": 0.5,
        "image_std": 0.5,
        "padding_mode": "constant",
        "padding_value": float(fuyu.PADDING),
        "patch_size": {"height": patch, "width": patch},
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": height, "width": width},
    }
    kind = {"image_processor_type": "FuyuImageProcessor", "processor_class": "FuyuProcessor"}
    complete_json(folder / PREPROCESSOR_CONFIG, published, kind)


def probe(config: Mapping[str, Any]) -> Pixels:
    """A small random image for `--verify`."""
    patch = fuyu.Config.from_dict(config).patch_size
    rows, columns = PROBE_PATCHES
    shape = (rows * patch, columns * patch, 3)
    data = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return fuyu.Patches(data, (columns * patch, rows * patch), newline=0)
