"""Families: one file each, named by a checkpoint's config.json."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .contract import Family

# `model_type` -> the family's file, here and in the converter.
FAMILIES = {
    "llava_qwen2": "fastvlm",
    "fast_vlm": "fastvlm",
    "idefics2": "idefics2",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
    "fuyu": "fuyu",
    "eve": "eve",
    "eve-qwen2": "eve2",
    "llava": "llava",
    "llava_llama": "llava",
    "share4v": "llava",
    "convllava": "convllava",
    "moe_llava_stablelm": "moe_llava",
    "moe_llava_qwen": "moe_llava",
    "moe_llava_phi": "moe_llava",
    "cambrian_llama": "cambrian",
    "mobilevlm": "mobilevlm",
    "llava_onevision": "llava_onevision",
    "llava_qwen": "llava_onevision",
}
# Published layouts that share their model_type with another family (lmms-lab's OneVision: "llava").
ARCHITECTURES = {"LlavaQwenForCausalLM": "llava_onevision"}
# And those that share the architecture as well: what the name of LLaVA's tower has in it tells.
TOWERS = {"convnext": "convllava"}
# Cambrian-1-13B was LLaVA's too for a time; its connector's name tells.
CONNECTORS = {"sva": "cambrian"}


def family_name(config: Mapping[str, Any]) -> str:
    """Which family a config.json belongs to, published or native.

    Raises UsageError for a model_type this version does not know.
    """
    kind, architectures = config.get("model_type"), config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    name = ARCHITECTURES.get(str(named)) or FAMILIES.get(str(kind))
    if name == "llava":
        tower = str(config.get("mm_vision_tower")).lower()
        name = next((own for part, own in TOWERS.items() if part in tower), name)
        name = CONNECTORS.get(str(config.get("mm_projector_type")), name)
    if name is None:
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(f"config.json: model_type {kind!r} is not supported (known: {known})")
    return name


def family(config: Mapping[str, Any]) -> "Family[Any]":
    """The family of a config.json. Raises UsageError for one this version does not know."""
    family: Family[Any] = import_module(f".{family_name(config)}", __name__).FAMILY
    return family
