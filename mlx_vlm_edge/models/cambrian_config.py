"""Cambrian-1's settings: config.json -> what the model and its processor go by, or a clear line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.config import check, first
from ..connectors.sva import SVAConfig
from ..errors import UsageError
from ..language.llama import TextConfig
from ..picture.image import Color
from ..picture.preprocessing import Preprocessing, refuse_max_tiles
from ..vision.pixels import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD
from ..vision.several import TowerConfig
from .base import eos_ids

ONLY = {
    "mm_projector_type": "sva", "num_query_group": 1, "connector_only": False,
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
}  # fmt: skip
_CLIP_FILL = (122, 116, 104)
# model_type -> what a picture is padded with, and its mean and deviation in 0..1. SigLIP's padding
# is CLIP's mean, in the original as well.
PIXELS: dict[str, tuple[Color, tuple[float, ...], tuple[float, ...]]] = {
    "siglip_vision_model": (_CLIP_FILL, HALF, HALF),
    "clip_vision_model": (_CLIP_FILL, CLIP_MEAN, CLIP_STD),
    "convnext": (_CLIP_FILL, CLIP_MEAN, CLIP_STD),
    "dinov2": ((123, 116, 103), IMAGENET_MEAN, IMAGENET_STD),
}


@dataclass(frozen=True)
class View:
    """How one of the towers is shown a picture."""

    tower: TowerConfig
    fill: Color
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not.

    sampler_layers: after which layers of the language model visual tokens look again.
    """

    text: TextConfig
    views: tuple[View, ...]
    aggregator: SVAConfig
    sampler_layers: tuple[int, ...]
    image_token_index: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self)
        if any(not 0 <= at < self.text.num_hidden_layers for at in self.sampler_layers):
            raise UsageError(
                f"config.json: samplers after layer {max(self.sampler_layers)} of "
                f"{self.text.num_hidden_layers}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        for key, value in ONLY.items():
            if config.get(key, value) != value:
                raise UsageError(f"config.json: {key} {config[key]!r} is not known in Cambrian-1")
        for part in ("text_config", "vision_config"):
            if not isinstance(config.get(part), Mapping):
                raise UsageError(f"config.json lacks {part!r}")
        tied = config.get("tie_word_embeddings", False)
        text = TextConfig.from_dict({**config["text_config"], "tie_word_embeddings": tied}, "llama")
        views = _views(config)
        (queries,) = _numbers(config, "query_num_list", 1)
        return cls(
            text=text,
            views=views,
            aggregator=SVAConfig(
                width=_number(config, "vision_hidden_size"),
                side=_side(queries),
                features=tuple(view.tower.width for view in views),
                sides=tuple(view.tower.side for view in views),
                depth=_number(config, "connector_depth"),
            ),
            sampler_layers=_sampler_layers(config),
            image_token_index=config.get("image_token_index", -200),
            bos_token_id=first(config.get("bos_token_id"), 1),
            eos_token_ids=eos_ids(config),
            context=text.max_position_embeddings,
            source=config,
        )

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same: nothing can be changed. Raises UsageError for whatever is asked for."""
        refuse_max_tiles(asked)
        if asked.strategy not in (None, "pad"):
            raise UsageError(
                f"image strategy {asked.strategy!r}: Cambrian-1's tokens go by a picture's padding"
            )
        if asked.resolution is not None:
            sizes = ", ".join(str(view.tower.image_size) for view in self.views)
            raise UsageError(f"image size {asked.resolution}: these towers take {sizes} only")
        return self


def _views(config: Mapping[str, Any]) -> tuple[View, ...]:
    towers = config["vision_config"].get("towers")
    if not isinstance(towers, list) or not all(isinstance(tower, Mapping) for tower in towers):
        raise UsageError("vision_config: towers is not a list of configs")
    lengths = _numbers(config, "mm_vision_tower_aux_token_len_list", len(towers))
    return tuple(
        View(TowerConfig.from_dict(tower, _side(length)), *PIXELS[str(tower["model_type"])])
        for tower, length in zip(towers, lengths, strict=True)
    )


def _sampler_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    count, stride = (
        _number(config, f"{name}_of_vision_sampler_layers") for name in ("num", "stride")
    )
    start = _number(config, "start_of_vision_sampler_layers")
    return tuple(range(start, start + count * stride, stride)) if stride else ()


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 <= value < 1 << 20:
        raise UsageError(f"config.json: {key} cannot be {value!r}")
    return value


def _numbers(config: Mapping[str, Any], key: str, count: int) -> list[int]:
    """Raises UsageError unless there are as many whole numbers."""
    values = config.get(key)
    whole = isinstance(values, list) and all(type(value) is int for value in values)
    if not whole or not isinstance(values, list) or len(values) != count:
        raise UsageError(f"config.json: {key} is no list of {count} whole numbers")
    return values


def _side(count: int) -> int:
    """The side of a square grid. Raises UsageError for a number that is no square's."""
    side = round(max(count, 0) ** 0.5)
    if side < 1 or side * side != count:
        raise UsageError(f"config.json: {count} features of a tower are no square grid")
    return side
