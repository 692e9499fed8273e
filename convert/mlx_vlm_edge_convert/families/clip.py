"""CLIP and SigLIP towers for the LLaVA families: inside a checkpoint, or CLIP's in a repository of
their own."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.cache import usable_snapshot
from mlx_vlm_edge.hub.models import expanded, repo_id
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.vision.vit import KINDS

from ..checkpoint import read_checkpoint
from ..rules import Arrays, Rule, apply
from .vit import TOWER, tower_rules

HEAD_WIDTH = 64  # of every CLIP vision transformer; shapes do not tell the number of heads
_VIT_L_336 = (  # OpenAI's, and the two that ShareGPT4V trained on from it
    "openai/clip-vit-large-patch14-336",
    "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12",
    "Lin-Chen/ShareGPT4V-13B_Pretrained_vit-large336-l12",
)
_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
_SIGLIP_HEADS = 12  # transformers' default, which it leaves out
NOT_VISION = Rule(
    r"(?:text_model|text_projection|visual_projection|logit_scale)\b.*",
    None,
    why="CLIP's text side and the projection into their common space",
)


def published_tower(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's `vision_config` or, without weights that tell, that of the tower it names.

    Raises UsageError for a tower other than the CLIP ViT-L/14-336 of nearly every LLaVA.
    """
    own: Mapping[str, Any] | None = config.get("vision_config")
    if own:
        return own
    name = config.get("mm_vision_tower")
    if name not in _VIT_L_336:
        raise UsageError(f"config.json has no vision_config, and {name!r} is not known")
    published: Mapping[str, Any] = configs.read("llava-1.5-7b")["vision_config"]
    return published


def fetch_tower(config: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """`vision_config` and native weights of the tower that a config's mm_vision_tower names."""
    name, folder = tower_folder(config)
    rules = (*tower_rules("vision_model."), NOT_VISION)
    weights = apply(rules, read_checkpoint(folder), f"{name}, a CLIP model")
    whole = read_config(folder)
    return complete(whole.get("vision_config") or whole, weights, name), weights


def tower_folder(config: Mapping[str, Any]) -> tuple[str, Path]:
    """Name and folder of the tower that a config's mm_vision_tower names.

    It must be on this machine. Raises UsageError that says how to get it otherwise.
    """
    name = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    if not name:
        raise UsageError("the checkpoint has no vision tower and its config names none")
    folder = repository(name)
    if folder is None:
        raise UsageError(
            f"the checkpoint has no vision tower; it was trained with {name}, which is not on "
            f"this machine: `mlx-vlm-edge models pull {name}` gets it"
        )
    return name, folder


def repository(name: str) -> Path | None:
    """The folder of a tower, which is one itself or the Hub's name of it; None where it is not on
    this machine."""
    folder = expanded(name)
    return folder if folder.is_dir() else usable_snapshot(repo_id(name))


def complete(
    given: Mapping[str, Any], weights: Arrays, name: str, prefix: str = TOWER
) -> dict[str, Any]:
    """A native `vision_config`: what a source says, the geometry of the weights, CLIP's or SigLIP's
    constants.

    name: of the tower's repository. prefix: of the weights. Raises UsageError where the two
    disagree, and for a tower that is not OpenAI's, whose activation nothing says.
    """
    patch = weights.get(f"{prefix}embeddings.patch_embedding.weight")
    positions = weights.get(f"{prefix}embeddings.position_embedding.weight")
    inner = weights.get(f"{prefix}encoder.layers.0.mlp.fc1.bias")
    if patch is None or positions is None or inner is None:
        raise UsageError("the checkpoint's vision tower is incomplete: fetch it again")
    if "hidden_act" not in given and name.startswith("laion/"):
        raise UsageError(f"vision tower {name!r}: its config is needed; only OpenAI's are known")
    layers = 0
    while f"{prefix}encoder.layers.{layers}.mlp.fc1.bias" in weights:
        layers += 1
    width, side = patch.shape[0], patch.shape[1]
    kind = _CLIP if f"{prefix}embeddings.class_embedding" in weights else _SIGLIP
    if kind == _SIGLIP and given.get("model_type") != kind:
        raise UsageError("the vision tower has no class token, and its config does not say SigLIP")
    clip = KINDS[kind].class_token
    grid = math.isqrt(positions.shape[0] - clip)
    size = given.get("image_size", grid * side)
    derived = {
        "hidden_size": width,
        "intermediate_size": inner.size,
        "num_hidden_layers": layers,
        "patch_size": side,
        "image_size": size if size // side == grid else grid * side,  # a rest is cut off
    }
    for key, value in derived.items():
        if given.get(key, value) != value:
            raise UsageError(f"vision_config says {key} {given[key]}, but the weights have {value}")
    constants = {
        "hidden_act": KINDS[kind].hidden_act,
        "layer_norm_eps": KINDS[kind].layer_norm_eps,
        "num_attention_heads": max(width // HEAD_WIDTH, 1) if clip else _SIGLIP_HEADS,
        "num_channels": 3,
    }
    return {**constants, **given, **derived, "model_type": kind}


def probe(config: Mapping[str, Any]) -> Pixels:
    """A random image for `--verify`."""
    side = config["vision_config"]["image_size"]
    data = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return Pixels(data, (side, side))
