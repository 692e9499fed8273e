"""What Idefics3 and SmolVLM need of config.json and of the preprocessor_config.json beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.config import check
from ..checkpoint.configs.defaults import IDEFICS3_VISION, LLAMA
from ..checkpoint.files import PREPROCESSOR_CONFIG
from ..errors import UsageError
from ..language.llama import TextConfig
from ..picture.preprocessing import Preprocessing, check_settings
from ..vision.vit import ViTConfig
from .base import eos_ids

SIZES = 4  # the longest edge, in tiles, that the published processors have
MARKED = 6  # rows and columns that the vocabulary and the training have markers for
STRATEGIES = ("split", "no-upscale", "stretch")
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 1}


@dataclass(frozen=True)
class Sampling:
    """Frames of a video that are taken per second, and in all; the longest edge of one."""

    fps: float
    max_frames: int
    longest_edge: int

    def __post_init__(self) -> None:
        check(self, positive=True)


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json and preprocessor_config.json; `source` has all of it.

    tile: the edge of a tile. longest_edge: of an image before it is cut. max_tiles: per image,
    the whole one included, None for no limit. video: None for models that were not trained on it.
    """

    text: TextConfig
    vision: ViTConfig
    scale_factor: int
    tile: int
    longest_edge: int
    strategy: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    video: Sampling | None
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        check(self)
        scale, patches = self.scale_factor, self.tile // self.vision.patch_size
        if scale < 1 or patches < 1 or patches % scale:
            raise UsageError(
                f"config.json: scale_factor {scale} does not divide tiles of {self.tile} pixels"
            )
        if self.longest_edge < 1 or min(self.std) <= 0:
            raise UsageError("preprocessor_config.json: size or image_std is not above zero")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a native config.json, which has `preprocessor_config` from the file beside it.

        Raises UsageError for a missing key or an unknown value.
        """
        for part in ("text_config", "vision_config"):
            if not isinstance(config.get(part), Mapping):
                raise UsageError(f"config.json lacks {part!r}")
        own, processor = config["vision_config"], _object(config, "preprocessor_config")
        check_settings(processor, FIXED)
        text, vision = _text(config), _vision(own)
        places = {PREPROCESSOR_CONFIG: processor, "config.json: vision_config": own}
        tile = _edge(places, "max_image_size", vision.image_size)
        return cls(
            text=text,
            vision=vision,
            scale_factor=config.get("scale_factor", 2),
            tile=tile,
            longest_edge=_edge(places, "size", SIZES * tile),
            strategy="split" if processor.get("do_image_splitting", True) else "stretch",
            mean=_channels(processor, "image_mean"),
            std=_channels(processor, "image_std"),
            video=_sampling(processor, tile) if config.get("model_type") == "smolvlm" else None,
            eos_token_ids=eos_ids(config),
            context=text.max_position_embeddings,
            source=config,
        )

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same with the user's preprocessing. Raises UsageError for values that cannot be.

        strategy: "split" cuts an enlarged image up, "no-upscale" leaves small ones small,
        "stretch" makes one tile of any. resolution: the longest edge of an image before it is cut.
        """
        if asked.strategy not in (None, *STRATEGIES):
            raise UsageError(
                f"image strategy {asked.strategy!r} is not one of {', '.join(STRATEGIES)}, which "
                "are what Idefics3 and SmolVLM have"
            )
        resolution, limit = asked.resolution, MARKED * self.tile
        if resolution is not None and not 1 <= resolution <= limit:
            raise UsageError(
                f"image size {resolution}: this model's tiles are {self.tile} pixels wide, and it "
                f"knows {MARKED} of them side by side: give at most {limit}"
            )
        if asked.max_tiles is not None and asked.max_tiles < 1:
            raise UsageError(f"max tiles {asked.max_tiles}: an image is at least one tile")
        return replace(
            self,
            strategy=asked.strategy or self.strategy,
            longest_edge=resolution or self.longest_edge,
            max_tiles=asked.max_tiles,
        )


def _text(config: Mapping[str, Any]) -> TextConfig:
    given = config["text_config"]
    if given.get("model_type", "llama") != "llama":
        raise UsageError(f"text_config: model_type {given['model_type']!r} is not known")
    tied = config.get("tie_word_embeddings", False)
    return TextConfig.from_dict({**LLAMA, **given, "tie_word_embeddings": tied}, "llama")


def _vision(given: Mapping[str, Any]) -> ViTConfig:
    config = {**IDEFICS3_VISION, **given}
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size",
             "hidden_act", "layer_norm_eps")  # fmt: skip
    return ViTConfig(
        layers=config["num_hidden_layers"],
        class_token=False,
        post_norm=True,
        **{name: config[name] for name in names},
    )


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = config.get(key) or {}
    if not isinstance(part, Mapping):
        raise UsageError(f"{key} cannot be {part!r}: it should be a JSON object")
    return part


def _edge(places: Mapping[str, Mapping[str, Any]], key: str, default: int) -> int:
    """The pixels of {"longest_edge": ...} under `key` in the first place (name -> content) that
    says some, or the default."""
    for where, config in places.items():
        said = config.get(key)
        if said is None or said == {} or said == {"longest_edge": None}:
            continue
        edge = said.get("longest_edge") if isinstance(said, Mapping) else None
        if edge is None:
            raise UsageError(f"{where}: {key} cannot be {said!r}, but {{'longest_edge': pixels}}")
        if type(edge) is not int or edge < 1:
            raise UsageError(f"{where}: {key}: longest_edge cannot be {edge!r}")
        return edge
    return default


def _channels(processor: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = processor.get(key) or [0.5, 0.5, 0.5]
    if not isinstance(values, list) or len(values) != 3:
        raise UsageError(f"preprocessor_config.json: {key} cannot be {values!r}")
    return values[0], values[1], values[2]


def _sampling(processor: Mapping[str, Any], tile: int) -> Sampling:
    given = _object(processor, "video_sampling")
    edge = _edge({f"{PREPROCESSOR_CONFIG}: video_sampling": given}, "video_size", tile)
    return Sampling(given.get("fps", 1.0), given.get("max_frames", 64), edge)
