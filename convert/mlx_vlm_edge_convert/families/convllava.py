"""ConvLLaVA checkpoints -> the native layout: LLaVA's names around a ConvNeXt tower.

Published with LLaVA's own model_type and config; `mm_vision_tower` alone tells. The checkpoints of
the last training stage hold the tower, which is the fine-tuned one and is used; where one lacks it,
the repository that its config names must be on this machine.
Source: alibaba/conv-llava; transformers, models/convnext.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.config import PREPROCESSOR, read_config, says_tied
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.convllava import is_native
from mlx_vlm_edge.vision.pixels import CLIP_MEAN, CLIP_STD

from ..checkpoint import read_checkpoint
from ..rules import Arrays, Rule, apply, to_channels_last
from ..save import clip_preprocessor, complete_json
from .clip import probe as probe
from .clip import tower_folder
from .decoder import settle_head
from .llava import from_original, original_rules
from .vit import TOWER

Config = dict[str, Any]

ORIGINAL_TOWER = "model.vision_tower.vision_tower."
PATCHES = "embeddings.patch_embeddings.weight"
PUBLISHED = {  # the geometry of ConvLLaVA-ConvNeXt-{768,1024,1536}
    "hidden_sizes": [192, 384, 768, 1536, 3072],
    "depths": [3, 3, 27, 3, 6],
}
_NAMED = re.compile(r"ConvLLaVA/ConvLLaVA-ConvNeXt-\d+")
_CONSTANTS = {"model_type": "convnext", "hidden_act": "gelu", "num_channels": 3}
_ONLY = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "patch"}
_WB = r"(?:weight|bias)"


def tower_rules(prefix: str) -> tuple[Rule, ...]:
    """transformers' names of a ConvNeXt under `prefix`."""
    x = re.escape(prefix)
    convolutions = (
        r"embeddings\.patch_embeddings\.weight"
        r"|encoder\.stages\.\d+\.(?:downsampling_layer\.1|layers\.\d+\.dwconv)\.weight"
    )
    stage = (
        rf"downsampling_layer\.(?:0\.{_WB}|1\.bias)"
        rf"|layers\.\d+\.(?:dwconv\.bias|(?:layernorm|pwconv[12])\.{_WB}|layer_scale_parameter)"
    )
    return (
        Rule(rf"{x}({convolutions})", rf"{TOWER}\1", to_channels_last),
        Rule(rf"{x}(embeddings\.(?:patch_embeddings\.bias|layernorm\.{_WB}))", rf"{TOWER}\1"),
        Rule(rf"{x}(encoder\.stages\.\d+\.(?:{stage}))", rf"{TOWER}\1"),
        Rule(rf"{x}layernorm\.{_WB}", None, why="the norm after pooling; features are before it"),
    )


def rules() -> tuple[Rule, ...]:
    """The original repository's names."""
    return original_rules(tower_rules(ORIGINAL_TOWER))


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return rules()


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[Config, Arrays]:
    """The native config and weights of a published ConvLLaVA.

    Raises UsageError when names, shapes and config disagree.
    """
    native = dict(weights) if is_native(weights) else apply(rules(), weights, "ConvLLaVA's layout")
    translated, pixels = _translated(config), preprocessor or {}
    vision = dict(config.get("vision_config") or {})
    if not any(name.startswith(TOWER) for name in native):
        own, beside_it, tower = _fetch_tower(config)
        native |= tower
        vision = {**own, **vision}
        pixels = translated[PREPROCESSOR] = pixels or beside_it
    translated["vision_config"] = {
        **geometry(vision, native, TOWER),
        "image_size": image_size(config, vision, pixels),
    }
    translated["tie_word_embeddings"] = settle_head(native, says_tied(translated))
    return translated, native


def config_alone(config: Mapping[str, Any]) -> Config:
    """The native config of a published one without weights: the tower is the one it names."""
    vision = dict(config.get("vision_config") or {})
    if not vision:
        name = str(config.get("mm_vision_tower"))
        if not _NAMED.fullmatch(name):
            raise UsageError(f"config.json has no vision_config, and {name!r} is not known")
        vision = {**_CONSTANTS, **PUBLISHED, "patch_size": 4}
    side = image_size(config, vision, config.get(PREPROCESSOR) or {})
    return {**_translated(config), "vision_config": {**vision, "image_size": side}}


def _translated(config: Mapping[str, Any]) -> Config:
    """The native words, the tower's own aside; a native config stays as it is."""
    if "text_config" in config:
        return dict(config)
    for key, only in _ONLY.items():
        if config.get(key, only) != only:
            raise UsageError(f"config.json: {key} {config[key]!r} is not known in ConvLLaVA")
    return {**from_original(config), "model_type": "convllava", "vision_feature_layer": -1}


def image_size(
    config: Mapping[str, Any], vision: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> int:
    """Pixels along a side: what the preprocessor's file, the tower's config or a name ends in says.

    image_size({"mm_vision_tower": "ConvLLaVA/ConvLLaVA-ConvNeXt-768"}, {}, {}) -> 768. No key of
    the published config.json does. Raises UsageError where nothing says.
    """
    cropped = preprocessor.get("crop_size")
    said = cropped.get("height") if isinstance(cropped, Mapping) else None
    if isinstance(said := said or vision.get("image_size"), int):
        return said
    for key in ("mm_vision_tower", "_name_or_path"):
        if number := re.search(r"-(\d{2,4})/?$", str(config.get(key, ""))):
            return int(number[1])
    raise UsageError(
        "nothing says at which size ConvLLaVA's pictures are: add the preprocessor_config.json of "
        "its vision tower to the folder"
    )


def _fetch_tower(config: Mapping[str, Any]) -> tuple[Config, Mapping[str, Any], Arrays]:
    """Config, preprocessor and native weights of the tower that mm_vision_tower names."""
    name, folder = tower_folder(config)
    weights = apply(tower_rules(""), read_checkpoint(folder), f"{name}, a ConvNeXt")
    read = read_config(folder)
    return read, read.pop(PREPROCESSOR), weights


def geometry(said: Mapping[str, Any], weights: Mapping[str, mx.array], prefix: str) -> Config:
    """A ConvNeXt's native config by its native weights, which are under `prefix`.

    Raises UsageError where the source says another.
    """
    if (patches := f"{prefix}{PATCHES}") not in weights:
        raise UsageError("the checkpoint's vision tower is incomplete: fetch it again")
    widths: list[int] = []
    depths: list[int] = []
    while (stage := f"{prefix}encoder.stages.{len(depths)}.layers.") + "0.dwconv.bias" in weights:
        widths.append(weights[f"{stage}0.dwconv.bias"].size)
        depths.append(sum(n.startswith(stage) and n.endswith("dwconv.bias") for n in weights))
    derived = {"hidden_sizes": widths, "depths": depths, "patch_size": weights[patches].shape[1]}
    for key, value in derived.items():
        if said.get(key, value) != value:
            raise UsageError(f"vision_config says {key} {said[key]}, but the weights have {value}")
    return {**_CONSTANTS, **derived}


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """preprocessor_config.json, which no published ConvLLaVA has: the tower's."""
    size = config["vision_config"]["image_size"]
    complete_json(folder / PREPROCESSOR_CONFIG, clip_preprocessor(size, CLIP_MEAN, CLIP_STD), {})
