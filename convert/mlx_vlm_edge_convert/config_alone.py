"""A published config.json -> the native one, where there are no weights to hold it against.

What only weights could tell (FastViTHD's layers, CLIP's) is taken to be as published.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.config import PREPROCESSOR
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models import family_name

from .families.fastvlm_config import from_apple
from .families.fastvlm_config import from_transformers as from_fast_vlm
from .families.llava import from_original, from_transformers
from .families.llava_onevision import nested
from .families.mobilevlm import named_projector

Config = dict[str, Any]

_CLIP = "openai/clip-vit-large-patch14-336"
_TIED = "tie_word_embeddings"


def native_config(config: Mapping[str, Any]) -> Config:
    """A config in the native words; one that has them already keeps what it says.

    The output head is tied where the config or its text_config says so. Raises UsageError for a
    model that is not known, and for a vision tower whose geometry nothing tells.
    """
    translate = _TRANSLATED.get(family_name(config), dict)
    try:
        native = translate(config)
        parts = (native, native.get("text_config") or {})
        return {**native, _TIED: any(part.get(_TIED) for part in parts)}
    except KeyError as error:
        raise UsageError(f"config.json lacks {error.args[0]!r}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"config.json: a value is of the wrong kind ({error})") from error


def _fastvlm(config: Mapping[str, Any]) -> Config:
    if config.get("model_type") == "fast_vlm":
        return from_fast_vlm(config, config.get(PREPROCESSOR) or {})
    return from_apple(config)


def _llava(config: Mapping[str, Any]) -> Config:
    nests = config.get("text_config") is not None
    native = (
        from_transformers(config, config.get(PREPROCESSOR) or {})
        if nests
        else from_original(config)
    )
    return {**native, "vision_config": _clip(config)}


def _mobilevlm(config: Mapping[str, Any]) -> Config:
    projector = named_projector(str(config.get("mm_projector_type")))
    return {**config, "mm_projector_type": projector, "vision_config": _clip(config)}


def _clip(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tower's config, or OpenAI's where one is named that every checkpoint has unchanged."""
    own: Mapping[str, Any] | None = config.get("vision_config")
    if own:
        return own
    name = config.get("mm_vision_tower")
    if name != _CLIP:
        raise UsageError(f"config.json has no vision_config, and {name!r} is not known")
    published: Mapping[str, Any] = configs.read("llava-1.5-7b")["vision_config"]
    return published


def _onevision(config: Mapping[str, Any]) -> Config:
    return dict(config) if config.get("text_config") else nested(config)


_TRANSLATED: dict[str, Callable[[Mapping[str, Any]], Config]] = {
    "fastvlm": _fastvlm,
    "llava": _llava,
    "mobilevlm": _mobilevlm,
    "llava_onevision": _onevision,
}
