"""FastVLM checkpoints -> the native (mlx-community) layout: names, tensor layouts, the tied head.

Three published layouts, each fused or un-fused: Apple's LLaVA-style one, transformers' `fast_vlm`
(its tower under timm's names), and the native one itself. Each is first renamed to Apple's words
in native places, still in PyTorch's tensor layout; then branches are merged; then convolutions
become channels-last. Sources: apple/ml-fastvlm; transformers models/fast_vlm; timm fastvit.py.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint.config import PREPROCESSOR, says_tied
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.fastvlm import is_native
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.wording import some

from .. import reparam
from ..rules import Arrays, Rule, apply, to_channels_last, to_last_axis
from ..save import clip_preprocessor, complete_json
from .decoder import decoder_rules, settle_head
from .fastvlm_config import Config, from_apple, from_transformers, head_width, native_config

TOWER = "vision_tower.vision_model."
APPLE_TOWER = "model.vision_tower.vision_tower.model."
TIMM_TOWER = "model.vision_tower.timm_model."
CLIP_HEAD = f"{TOWER}head.proj"
PROBE_SIDE = 128  # pixels of the image that `--verify` runs; the tower takes any multiple of 64

_WB = "(?:weight|bias)"
_BN = "(?:weight|bias|running_mean|running_var)"
_APPLE_BRANCH = rf"(?:rbr_conv\.\d+\.|rbr_scale\.)(?:conv\.weight|bn\.{_BN})|rbr_skip\.{_BN}"
_APPLE_MOBILE_ONE = rf"(?:reparam_conv\.{_WB}|{_APPLE_BRANCH})"
_ATTENTION = rf"token_mixer\.(?:qkv\.weight|proj\.{_WB})|norm\.{_WB}"

_TO_NATIVE_TENSORS = (
    Rule(
        rf"({re.escape(TOWER)}.*\.(?:reparam_conv|lkb_reparam|conv\.conv|fc[12]|reduce|expand)"
        r"\.weight)",
        r"\1",
        to_channels_last,
    ),
    Rule(rf"({re.escape(TOWER)}.*\.layer_scale(?:_[12])?)", r"\1", to_last_axis),
    Rule(r"(.*)", r"\1"),
)

_BATCH_COUNTS = Rule(
    r".*\.num_batches_tracked", None, why="counts training steps; inference never reads it"
)


def _apple_tower(prefix: str) -> tuple[Rule, ...]:
    """Apple's names under `prefix`, fused or un-fused."""
    x = re.escape(prefix)
    block = (
        rf"layer_scale(?:_[12])?|convffn\.(?:conv\.conv\.weight|conv\.bn\.{_BN}|fc[12]\.{_WB})"
        rf"|token_mixer\.(?:(?:mixer|norm)\.(?:{_APPLE_BRANCH})|layer_scale|reparam_conv\.{_WB})"
        rf"|{_ATTENTION}"
    )
    large = rf"lkb_reparam\.{_WB}|(?:lkb_origin|small_conv)\.(?:conv\.weight|bn\.{_BN})"
    return (
        _BATCH_COUNTS,
        Rule(rf"{x}patch_embed\.(\d\.{_APPLE_MOBILE_ONE})", rf"{TOWER}patch_embed.blocks.\1"),
        Rule(rf"{x}(network\.\d+\.\d+\.(?:{block}))", rf"{TOWER}\1"),
        Rule(rf"{x}(network\.\d+\.proj\.0\.(?:{large}))", rf"{TOWER}\1"),
        Rule(rf"{x}(network\.\d+\.proj\.1\.{_APPLE_MOBILE_ONE})", rf"{TOWER}\1"),
        Rule(rf"{x}(network\.\d+\.(?:reparam_conv|pe)\.{_WB})", rf"{TOWER}\1"),
        Rule(rf"{x}(conv_exp\.{_APPLE_MOBILE_ONE})", rf"{TOWER}\1"),
        Rule(rf"{x}(conv_exp\.se\.(?:reduce|expand)\.{_WB})", rf"{TOWER}\1"),
        Rule(rf"{x}(head\.proj)", rf"{TOWER}\1"),
    )


def _timm_mobile_one(source: str, target: str) -> tuple[Rule, ...]:
    """A MobileOne block: timm's words -> Apple's. `source` may have one group, \\1 in `target`."""
    group = 2 if "(" in source else 1
    return (
        Rule(rf"{source}(reparam_conv\.{_WB})", rf"{target}\{group}"),
        Rule(
            rf"{source}conv_kxk\.(\d+\.(?:conv\.weight|bn\.{_BN}))",
            rf"{target}rbr_conv.\{group}",
        ),
        Rule(rf"{source}conv_scale\.(conv\.weight|bn\.{_BN})", rf"{target}rbr_scale.\{group}"),
        Rule(rf"{source}identity\.({_BN})", rf"{target}rbr_skip.\{group}"),
    )


def _timm_stage(source: str, stage: int, index: int, position: bool) -> tuple[Rule, ...]:
    """Stage `stage` of timm, whose blocks are `network.<index>` in Apple's numbering."""
    blocks, out = rf"{source}stages\.{stage}\.blocks\.(\d+)\.", rf"{TOWER}network.{index}.\1."
    down, entry = rf"{source}stages\.{stage}\.downsample\.proj\.", index - 1 - position
    large = rf"{TOWER}network.{entry}.proj.0."
    encoding = rf"{source}stages\.{stage}\.pos_emb\."
    return (
        *_timm_mobile_one(rf"{blocks}token_mixer\.mixer\.", rf"{out}token_mixer.mixer."),
        *_timm_mobile_one(rf"{blocks}token_mixer\.norm\.", rf"{out}token_mixer.norm."),
        *_timm_mobile_one(rf"{blocks}token_mixer\.", rf"{out}token_mixer."),
        Rule(rf"{blocks}token_mixer\.layer_scale\.gamma", rf"{out}token_mixer.layer_scale"),
        Rule(rf"{blocks}(layer_scale(?:_[12])?)\.gamma", rf"{out}\2"),
        Rule(rf"{blocks}({_ATTENTION})", rf"{out}\2"),
        Rule(
            rf"{blocks}mlp\.(conv\.conv\.weight|conv\.bn\.{_BN}|fc[12]\.{_WB})",
            rf"{out}convffn.\2",
        ),
        Rule(rf"{down}0\.reparam_conv\.({_WB})", rf"{large}lkb_reparam.\1"),
        Rule(rf"{down}0\.large_conv\.(conv\.weight|bn\.{_BN})", rf"{large}lkb_origin.\1"),
        Rule(rf"{down}0\.(small_conv\.(?:conv\.weight|bn\.{_BN}))", rf"{large}\1"),
        *_timm_mobile_one(rf"{down}1\.", rf"{TOWER}network.{entry}.proj.1."),
        Rule(rf"{encoding}reparam_conv\.({_WB})", rf"{TOWER}network.{index - 1}.reparam_conv.\1"),
        Rule(rf"{encoding}pos_enc\.({_WB})", rf"{TOWER}network.{index - 1}.pe.\1"),
    )


def _timm_tower(prefix: str, names: Iterable[str]) -> tuple[Rule, ...]:
    """timm's `fastvit` names under `prefix`, fused or un-fused.

    Apple numbers downsamplings, position encodings and stages in one list: with an encoding in
    front of stages 3 and 4, stage 0..4 -> network.0, 2, 4, 7, 10.
    """
    x = re.escape(prefix)
    pattern = re.compile(rf"{x}stages\.(\d+)\.(pos_emb|blocks)\.")
    blocks = {(int(match[1]), match[2]) for name in names if (match := pattern.match(name))}
    rules: list[Rule] = [_BATCH_COUNTS]
    index = -1
    for stage in range(1 + max((stage for stage, _ in blocks), default=-1)):
        position = (stage, "pos_emb") in blocks
        index += 1 + (stage > 0) + position
        rules += _timm_stage(x, stage, index, position)
    return (
        *rules,
        *_timm_mobile_one(rf"{x}stem\.(\d)\.", rf"{TOWER}patch_embed.blocks.\1."),
        *_timm_mobile_one(rf"{x}final_conv\.", f"{TOWER}conv_exp."),
        Rule(rf"{x}final_conv\.se\.fc1\.({_WB})", rf"{TOWER}conv_exp.se.reduce.\1"),
        Rule(rf"{x}final_conv\.se\.fc2\.({_WB})", rf"{TOWER}conv_exp.se.expand.\1"),
        Rule(rf"{x}head\.fc\.{_WB}", None, why="timm's CLIP head; FastVLM reads the map before it"),
    )


_APPLE_REST = (
    Rule(rf"model\.(mm_projector\.[02]\.{_WB})", r"\1"),
    *decoder_rules("model."),
)
_TRANSFORMERS_REST = (
    Rule(rf"model\.multi_modal_projector\.linear_1\.({_WB})", r"mm_projector.0.\1"),
    Rule(rf"model\.multi_modal_projector\.linear_2\.({_WB})", r"mm_projector.2.\1"),
    *decoder_rules("model.language_model."),
)


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in both spellings: all but the tower's.

    A tower that was trained is in its training form, which is merged when a whole checkpoint is.
    """
    return (*_APPLE_REST, *_TRANSFORMERS_REST)


def _apple_rules() -> tuple[Rule, ...]:
    return (*_apple_tower(APPLE_TOWER), *_APPLE_REST)


def _transformers_rules(names: Iterable[str]) -> tuple[Rule, ...]:
    return (*_timm_tower(TIMM_TOWER, names), *_TRANSFORMERS_REST)


def rename(weights: Mapping[str, mx.array]) -> Arrays:
    """Any published layout -> native names and tensor layouts, branches merged. Lazy.

    The head is kept where the source has one. Raises UsageError for an unknown layout and for
    names without a rule.
    """
    if is_native(weights):
        return dict(weights)
    return apply(_TO_NATIVE_TENSORS, reparam.merge(place(weights)), "FastVLM")


def place(weights: Mapping[str, mx.array]) -> Arrays:
    """Any published layout -> Apple's words in native places, PyTorch's layout, branches apart."""
    if any(name.startswith(APPLE_TOWER) for name in weights):
        return apply(_apple_rules(), weights, "Apple's FastVLM layout")
    if any(name.startswith(TIMM_TOWER) for name in weights):
        return apply(_transformers_rules(weights), weights, "transformers' fast_vlm layout")
    if any(name.startswith("multi_modal_projector.linear_") for name in weights):
        raise UsageError(
            "this is Apple's app export, which holds no vision weights; "
            "convert apple/FastVLM-0.5B (or -1.5B, -7B) instead"
        )
    raise UsageError(f"no FastVLM layout has names such as {some(weights)}")


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[Config, Arrays]:
    """The native config and weights of a published FastVLM checkpoint.

    `preprocessor` is its preprocessor_config.json, where it has one. `head.proj`, which FastVLM
    never reads, is kept, and is zeros where the source lacks it.
    Raises UsageError when names, shapes and config disagree.
    """
    native = rename(weights)
    tied = settle_head(native, says_tied(config))
    translated = native_config(config, native, tied=tied, preprocessor=preprocessor)
    if CLIP_HEAD not in native:
        like = native[f"{TOWER}conv_exp.reparam_conv.bias"]
        native[CLIP_HEAD] = mx.zeros((like.size, head_width(config)), dtype=like.dtype)
    return translated, native


def config_alone(config: Mapping[str, Any]) -> Config:
    """The native config of a published one without weights: the tower is the published one."""
    if config.get("model_type") == "fast_vlm":
        return from_transformers(config, config.get(PREPROCESSOR) or {})
    return from_apple(config)


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Complete preprocessor_config.json and processor_config.json as mlx-community writes them.

    mlx-swift-lm finds FastVLM's processor by `processor_class` and reads `crop_size`; other keys
    of a source are kept.
    """
    size = config["vision_config"]["image_size"]
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 0,
        "patch_size": config["vision_config"]["patch_size"],
    }
    kind = {"processor_class": "FastVLMProcessor"}
    pixels = clip_preprocessor(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    complete_json(folder / PREPROCESSOR_CONFIG, pixels, kind)
    complete_json(folder / PROCESSOR_CONFIG, processor, kind)


def probe(config: Mapping[str, Any]) -> Pixels:
    """A small random image for `--verify`."""
    data = np.random.default_rng(0).integers(0, 256, (PROBE_SIDE, PROBE_SIDE, 3), np.uint8)
    return Pixels(data, (PROBE_SIDE, PROBE_SIDE))
