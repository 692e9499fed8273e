"""Cambrian-1 checkpoints -> the native layout, with the four vision towers that they leave out.

A checkpoint names its towers in its own words; each is a repository of another publisher, which
must be on this machine: open_clip's of SigLIP and ConvNeXt-XXL, OpenAI's CLIP, Meta's DINOv2. What
follows `-res` in a name is the size of the pictures, and so is the number at the end of SigLIP's;
what follows `-interp` is nothing that the config does not say as well.
Source: cambrian-mllm/cambrian, cambrian/model/multimodal_encoder/builder.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.configs.defaults import LLAMA
from mlx_vlm_edge.checkpoint.files import CONFIG, read_json
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.llama import KEYS
from mlx_vlm_edge.models.cambrian import is_native
from mlx_vlm_edge.models.cambrian_config import Config
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.picture.pieces import together
from mlx_vlm_edge.wording import some

from ..checkpoint import read_checkpoint
from ..rules import Arrays, Rule, apply, to_channels_last
from .clip import NOT_VISION, complete, repository
from .convllava import geometry as convnext_geometry
from .decoder import EMBEDDING, decoder_rules, settle_head
from .timm import convnext_rules, vit_rules, with_qkv_apart
from .vit import tower_rules

Native = dict[str, Any]

NAMES = "mm_vision_tower_aux_list"
_WB = r"(?:weight|bias)"
_SAMPLER = (
    r"layers\.\d+\.(?:pos_embed_\d+|proj_(?:context|in)\.weight|proj_out\.linear_[12]\.weight"
    rf"|norm\.{_WB}|cross_attn\.(?:o_proj\.weight|(?:q_proj|[kv]_proj_\d+)\.(?:0\.{_WB}|1\.weight)))"
)
_AGGREGATOR = (
    rf"vision_query|image_newline|mm_projector\.[02]\.{_WB}|mm_projector_aux_\d+\.[023]\.{_WB}"
    rf"|vision_sampler_0\.{_SAMPLER}"
)
RULES = (
    Rule(rf"model\.({_AGGREGATOR})", r"\1"),
    Rule(
        rf"model\.(vision_sampler_layers\.\d+\.{_SAMPLER})", r"language_model.model.\1"
    ),
    *decoder_rules("model."),
)  # fmt: skip


def _dinov2_rules(target: str) -> tuple[Rule, ...]:
    convolution = r"embeddings\.patch_embeddings\.projection\.weight"
    return (
        Rule(rf"({convolution})", rf"{target}\1", to_channels_last),
        Rule(r"((?:embeddings|encoder|layernorm)\..*)", rf"{target}\1"),
    )


def _clip_rules(target: str) -> tuple[Rule, ...]:
    return (*tower_rules("vision_model.", target), NOT_VISION)


class Kind(NamedTuple):
    """A tower by what its name in the config has in it. repository: None where that is the name
    itself, without its endings."""

    word: str
    repository: str | None
    rules: Callable[[str], tuple[Rule, ...]]
    described: Callable[[Mapping[str, Any], Arrays, str], Native]


def _siglip(said: Mapping[str, Any], weights: Arrays, prefix: str) -> Native:
    """timm's SigLIP has the exact GELU; its heads are 16 of any width."""
    table, patch, inner = (
        weights[f"{prefix}{name}"].shape
        for name in (
            "embeddings.position_embedding.weight",
            "embeddings.patch_embedding.weight",
            "encoder.layers.0.mlp.fc1.bias",
        )
    )
    return {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 16,
        "image_size": math.isqrt(table[0]) * patch[1],
        **said,
        "hidden_size": patch[0],
        "intermediate_size": inner[0],
        "num_hidden_layers": _layers(weights, f"{prefix}encoder.layers.", "mlp.fc1.bias"),
        "patch_size": patch[1],
    }


def _clip(said: Mapping[str, Any], weights: Arrays, prefix: str) -> Native:
    return complete(said.get("vision_config") or said, weights, "openai/", prefix)


def _dinov2(said: Mapping[str, Any], weights: Arrays, prefix: str) -> Native:
    embeddings = f"{prefix}embeddings."
    patch = weights[f"{embeddings}patch_embeddings.projection.weight"].shape
    side = math.isqrt(weights[f"{embeddings}position_embeddings"].shape[1] - 1)
    first = f"{prefix}encoder.layer.0.mlp."
    return {
        "layer_norm_eps": 1e-6,
        "num_attention_heads": patch[0] // 64,
        **said,
        "model_type": "dinov2",
        "hidden_size": patch[0],
        "image_size": side * patch[1],
        "patch_size": patch[1],
        "num_hidden_layers": _layers(weights, f"{prefix}encoder.layer.", "norm1.bias"),
        "use_swiglu_ffn": f"{first}weights_in.bias" in weights,
    }


def _convnext(said: Mapping[str, Any], weights: Arrays, prefix: str) -> Native:
    """timm's largest has another eps than its smaller ones."""
    return {"norm_eps": 1e-5, "image_size": 1024, **said, **convnext_geometry({}, weights, prefix)}


def _layers(weights: Arrays, prefix: str, suffix: str) -> int:
    return sum(name.startswith(prefix) and name.endswith(suffix) for name in weights)


# In the order of the original's tests, whichever is first.
KINDS = (
    Kind("openai/clip", None, _clip_rules, _clip),
    Kind("siglip", "timm/ViT-SO400M-14-SigLIP-384", vit_rules, _siglip),
    Kind(
        "clip-convnext-xxl",
        "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
        convnext_rules,
        _convnext,
    ),
    Kind("dinov2", None, _dinov2_rules, _dinov2),
)


def kind_of(name: str) -> Kind:
    """Raises UsageError for a tower that Cambrian-1 has not."""
    for kind in KINDS:
        if kind.word in name.lower():
            return kind
    raise UsageError(f"config.json: a vision tower {name!r} is not known in Cambrian-1")


def named_size(name: str) -> int | None:
    """What a name says of the pictures' size: "facebook/dinov2-giant-res378" -> 378."""
    size = re.search(r"-res(\d{1,4})\b", name)
    return int(size[1]) if size else None


def _last_number(name: str) -> int:
    """ "siglip/CLIP-ViT-SO400M-14-384-interp576" -> 384, 0 where a name ends otherwise."""
    number = re.search(r"-(\d{1,4})$", _without_endings(name))
    return int(number[1]) if number else 0


def _without_endings(name: str) -> str:
    return re.sub(r"-(?:res|interp)\d+", "", name)


def _repository(name: str) -> str:
    """Which one has a tower's weights: facebook/dinov2-giant-res378 -> facebook/dinov2-giant."""
    return kind_of(name).repository or _without_endings(name)


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change; the four towers are others' and stay."""
    return RULES


def tower_repositories(config: Mapping[str, Any]) -> list[str]:
    """Which ones have the towers' weights, in the towers' order."""
    return [_repository(name) for name in _names(config)]


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[Native, Arrays]:
    """The native config and weights of a published checkpoint.

    Raises UsageError when names, shapes and config disagree, and for a tower that is not on this
    machine.
    """
    if is_native(weights):
        return dict(config), dict(weights)
    if "model.vision_query" not in weights:
        raise UsageError(f"no Cambrian-1 layout has names such as {some(weights)}")
    native = apply(RULES, weights, "Cambrian-1's layout")
    if EMBEDDING not in native:
        raise UsageError("the checkpoint has no complete Cambrian-1: shards may be missing")
    translated = _translated(config)
    said = dict(enumerate((config.get("vision_config") or {}).get("towers") or []))
    towers = []
    for index, (name, folder) in enumerate(_folders(_names(config))):
        tower, arrays = _tower(name, folder, f"vision_tower.{index}.", said.get(index, {}))
        towers.append(tower)
        native |= arrays
    translated["vision_config"] = {"model_type": "several", "towers": towers}
    translated["tie_word_embeddings"] = settle_head(native, says_tied(translated))
    return translated, native


def _folders(names: Sequence[str]) -> list[tuple[str, Path]]:
    """Each tower's name and the folder that has it. Raises UsageError that says how to get those
    that are not on this machine."""
    repositories = [_repository(name) for name in names]
    folders = [repository(name) for name in repositories]
    missing = [name for name, at in zip(repositories, folders, strict=True) if at is None]
    if missing:
        ways = ", ".join(f"`mlx-vlm-edge models pull {name}`" for name in missing)
        raise UsageError(
            "the checkpoint has no vision towers; of those it was trained with, not all are on "
            f"this machine: {ways} {'gets' if len(missing) == 1 else 'get'} what lacks"
        )
    return [(name, at) for name, at in zip(names, folders, strict=True) if at is not None]


def _tower(name: str, folder: Path, prefix: str, said: Mapping[str, Any]) -> tuple[Native, Arrays]:
    """Native config and weights of a tower. said: what the checkpoint's config says of it, which
    goes before the tower's own."""
    kind = kind_of(name)
    beside = {} if kind.repository else read_json(folder / CONFIG)  # open_clip's has no words of it
    weights = read_checkpoint(folder)
    if kind.rules is vit_rules:
        weights = with_qkv_apart(weights)
    native = apply(kind.rules(prefix), weights, f"{name}, a vision tower")
    try:
        described = kind.described({**beside, **said}, native, prefix)
    except KeyError as error:
        raise UsageError(
            f"{folder}: the vision tower lacks {error.args[0]}; fetch it again"
        ) from None
    return {**described, **_shown_at(name, described)}, native


def _shown_at(name: str, tower: Mapping[str, Any]) -> Native:
    """The size of the pictures, where a tower's name says one.

    SigLIP's number counts where it makes the grid of the weights: 384 / 14 leaves a rest, which no
    shape shows.
    """
    size = named_size(name)
    if size is None and tower["model_type"] == "siglip_vision_model":
        last, patch = _last_number(name), tower["patch_size"]
        size = last if last // patch == tower["image_size"] // patch else None
    if size is None:
        return {}
    return {"input_size" if tower["model_type"] == "dinov2" else "image_size": size}


def config_alone(config: Mapping[str, Any]) -> Native:
    """The native config of a published one without weights: the towers are those it names."""
    if config.get("text_config") is not None and config.get("vision_config") is not None:
        return dict(config)
    known = configs.read("cambrian-8b")
    published = dict(zip(known[NAMES], known["vision_config"]["towers"], strict=True))
    by_word = {kind_of(name).word: (name, tower) for name, tower in published.items()}
    towers = []
    for name in _names(config):
        own, tower = by_word[kind_of(name).word]
        if _repository(name) != _repository(own):
            raise UsageError(f"config.json has no vision_config, and {name!r} is not known")
        towers.append({**tower, **_shown_at(name, tower)})
    vision = {"model_type": "several", "towers": towers}
    return {**_translated(config), "vision_config": vision}


def _names(config: Mapping[str, Any]) -> Sequence[str]:
    names = config.get(NAMES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"config.json: {NAMES} is no list of vision towers")
    return names


def _translated(config: Mapping[str, Any]) -> Native:
    """The native words, the towers aside; a native config stays as it is."""
    if config.get("text_config") is not None:
        return dict(config)
    text = {key: config[key] for key in KEYS if key in config}
    return {
        "tie_word_embeddings": False,
        "image_token_index": -200,
        **config,
        "model_type": "cambrian_llama",
        "text_config": {"model_type": "llama", **LLAMA, **text},
    }


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Nothing: no preprocessor's file has words for four towers."""


def probe(config: Mapping[str, Any]) -> Pixels:
    """A random image, wider than high, for `--verify`."""
    draw = np.random.default_rng(0)
    sides = [view.tower.image_size for view in Config.from_dict(config).views]
    return together(
        [draw.integers(0, 256, (side, side, 3), np.uint8) for side in sides], (640, 480)
    )
