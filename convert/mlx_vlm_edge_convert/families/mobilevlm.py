"""MobileVLM checkpoints, V1 and V2 -> the native layout: LLaVA's names, its connectors' own kept.

Every published checkpoint holds its vision tower, and that one is used; the original loader of V1
puts OpenAI's in its place, which is the same before its rounding to bfloat16.
Source: Meituan-AutoML/MobileVLM, mobilevlm/model/{mobilevlm,vision_projector}.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.llava import is_native
from mlx_vlm_edge.models.mobilevlm import visual_tokens
from mlx_vlm_edge.vision.pixels import CLIP_MEAN, CLIP_STD
from mlx_vlm_edge.wording import some

from ..rules import Arrays, Rule, apply, to_channels_last
from ..save import clip_preprocessor, complete_json
from .clip import probe as probe
from .clip import published_tower
from .decoder import EMBEDDING, decoder_rules, settle_head
from .llava import ORIGINAL_TOWER, check_original, place_tower
from .vit import tower_rules

Config = dict[str, Any]

PROJECTOR = "mm_projector."
# A name that only this connector has. "ldpnetv2" begins with "ldpnet", so it is asked about first.
_TELLING = {"ldpnetv2": f"{PROJECTOR}mlp.mlp.0.weight", "ldpnet": f"{PROJECTOR}model.mlp.1.weight"}
_WB = r"(?:weight|bias)"
_BLOCK = r"model\.mb_block\.[12]\.block\."


def rules() -> tuple[Rule, ...]:
    """The published names; V2's depthwise convolution has a bias, V1's have none."""
    kept = rf"mm_projector\.(?:mlp\.mlp\.[02]|model\.mlp\.[13]|{_BLOCK}[02]\.1)\.{_WB}"
    convolutions = rf"mm_projector\.(?:peg\.peg\.0|{_BLOCK}(?:[02]\.0|1\.fc[12]))\.weight"
    biases = rf"mm_projector\.(?:peg\.peg\.0|{_BLOCK}1\.fc[12])\.bias"
    return (
        *tower_rules(ORIGINAL_TOWER),
        Rule(rf"model\.({convolutions})", r"\1", to_channels_last),
        Rule(rf"model\.({kept}|{biases})", r"\1"),
        *decoder_rules("model."),
    )


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return rules()


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[Config, Arrays]:
    """The native config and weights of a published MobileVLM checkpoint.

    Raises UsageError when names, shapes and config disagree.
    """
    native = dict(weights) if is_native(weights) else apply(rules(), weights, "MobileVLM's layout")
    check_original(config)
    translated: Config = {
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "image_token_index": -200,
        **config,
        "mm_projector_type": projector_type(config, native),
    }
    if EMBEDDING in native:
        translated.setdefault("vocab_size", native[EMBEDDING].shape[0])
    translated["vision_config"] = vision = place_tower(translated, native)
    side = vision["image_size"] // vision["patch_size"]
    translated["image_seq_length"] = visual_tokens(translated["mm_projector_type"], side)
    translated["tie_word_embeddings"] = settle_head(native, says_tied(translated))
    return translated, native


def config_alone(config: Mapping[str, Any]) -> Config:
    """The native config of a published one without weights."""
    projector = named_projector(str(config.get("mm_projector_type")))
    return {**config, "mm_projector_type": projector, "vision_config": published_tower(config)}


def projector_type(config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> str:
    """ "ldpnet" (V1) or "ldpnetv2", by the weights' names; a config that differs is refused."""
    kind = next((each for each, name in _TELLING.items() if name in weights), None)
    if kind is None:
        raise UsageError(f"no MobileVLM connector has names such as {some(weights)}")
    said = config.get("mm_projector_type", kind)
    if named_projector(str(said)) != kind:
        raise UsageError(f"config.json says mm_projector_type {said!r}, the weights are {kind!r}")
    return kind


def named_projector(said: str) -> str | None:
    """The connector that a config's mm_projector_type begins with, None for an unknown one."""
    return next((kind for kind in _TELLING if said.startswith(kind)), None)


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """preprocessor_config.json, which no published MobileVLM has: CLIP's constants."""
    size = config["vision_config"]["image_size"]
    complete_json(folder / PREPROCESSOR_CONFIG, clip_preprocessor(size, CLIP_MEAN, CLIP_STD), {})
