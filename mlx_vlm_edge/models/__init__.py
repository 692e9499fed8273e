"""Families: one file each, found by the `model_type` of a checkpoint's config.json."""

from importlib import import_module
from types import ModuleType

from ..errors import UsageError

FAMILIES = {
    "llava_qwen2": "fastvlm",
    "fast_vlm": "fastvlm",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
    "fuyu": "fuyu",
    "eve": "eve",
    "eve-qwen2": "eve2",
    "llava": "llava",
    "llava_llama": "llava",
    "mobilevlm": "mobilevlm",
    "llava_onevision": "llava_onevision",
    "llava_qwen": "llava_onevision",
}


def family(model_type: str | None) -> ModuleType:
    """The module of a family. Raises UsageError for a model_type this version does not know."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(
            f"config.json: model_type {model_type!r} is not supported (known: {known})"
        )
    return import_module(f".{FAMILIES[model_type]}", __name__)
