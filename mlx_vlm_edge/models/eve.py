"""EVE-7B and EVE-7B-HD, v1.0: a patch embedding layer -> mlp2x_gelu -> Vicuna.

Unlike LLaVA there is no vision encoder, and pictures keep their shape: the longer side becomes
`image_size` (672, HD 1344), the other what its proportion asks for, so that a picture is
1 + h * (w + 1) visual tokens. The preprocessor's file is not in the published repositories; its
constants are here. Trained with one picture per conversation; more are taken in order.
Native layout: `vision_tower.*`, `mm_projector.*`, `language_model.*` under the published names.
Source: baaivision/EVE, EVEv1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..checkpoint.config import first
from ..checkpoint.weights import Weights
from ..connectors.mlp import MLP
from ..errors import UsageError
from ..language.llama import LanguageModel, TextConfig
from ..picture.image import Pixels, fit
from ..picture.preprocessing import Preprocessing, refuse_max_tiles
from ..picture.resize import Levels, Picture, levels
from ..picture.token_budget import OF_TOKENS, Block
from ..vision.eve import PatchConfig, PatchEmbedding
from ..vision.pixels import CLIP_MEAN, CLIP_STD, normalized
from . import llava
from .base import VisionLanguageModel, eos_ids
from .contract import Family

PARTS = ("vision_tower.", "mm_projector.", "language_model.")
PATCH, WINDOW = 14, 2
CLIP_SIZE = 336  # the CLIP teacher's longer side, whose grid the picture's is a multiple of


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not.

    image_size: pixels of a picture's longer side. ratio: how many times that is the teacher's.
    """

    text: TextConfig
    vision: PatchConfig
    image_size: int
    ratio: int
    image_token_index: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        projector = config.get("mm_projector_type", "mlp2x_gelu")
        if projector != "mlp2x_gelu":
            raise UsageError(f"config.json: mm_projector_type {projector!r} is not known")
        if "mm_hidden_size" not in config:
            raise UsageError("config.json lacks 'mm_hidden_size'")
        patch, window = config.get("patch_stride", PATCH), config.get("conv_stride", WINDOW)
        size = config.get("image_size") or named_size(config, r".*-patch14-anypixel-(\d+)")
        ratio, rest = divmod(size, config.get("image_size_clip", CLIP_SIZE))
        if rest or ratio < 1:
            raise UsageError(
                f"config.json: an image size of {size} is not EVE's (672, 1344 or another multiple "
                f"of {config.get('image_size_clip', CLIP_SIZE)})"
            )
        text = TextConfig.from_dict(config, "llama")
        return cls(
            text=text,
            vision=PatchConfig(config["mm_hidden_size"], patch, window),
            image_size=size,
            ratio=ratio,
            image_token_index=config.get("image_token_index", -200),
            bos_token_id=first(config.get("bos_token_id"), llava.BOS),
            eos_token_ids=eos_ids(config),
            context=text.max_position_embeddings,
            source=config,
        )

    @property
    def step(self) -> int:
        """The pixels that both sides of a resized picture are multiples of."""
        return self.vision.patch * self.ratio

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same with the user's preprocessing. Raises UsageError for values that cannot be."""
        refuse_max_tiles(asked)
        refuse_strategy(asked)
        resolution = asked.resolution
        if resolution is None:
            return self
        if resolution < self.step or resolution % self.step:
            raise UsageError(f"image size {resolution}: this EVE takes multiples of {self.step}")
        return replace(self, image_size=resolution)


def named_size(config: Mapping[str, Any], pattern: str) -> int:
    """The image size that the name of the "vision tower" has in it.

    "openai/eve-patch14-anypixel-672" -> 672
    """
    name = str(config.get("mm_vision_tower")).rstrip("/")
    if match := re.fullmatch(pattern, name):
        return int(match[1])
    raise UsageError(f"config.json: mm_vision_tower {name!r} is not known, so no image size is")


def refuse_strategy(asked: Preprocessing) -> None:
    """Raises UsageError when the user wants pictures made square."""
    if asked.strategy is not None:
        raise UsageError("EVE keeps a picture's shape: leave the image strategy out")


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these are weights of the native layout."""
    return any(name.startswith("vision_tower.") for name in weights)


def rename(name: str) -> str:
    """A native weight's name -> its parameter's."""
    return name.replace("mm_projector.", "mm_projector.layers.", 1)


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights: nothing is folded."""
    return {name: array for part in PARTS for name, array in weights.take_prefix(part).items()}


class Model(VisionLanguageModel):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = PatchEmbedding(config.vision)
        self.mm_projector = MLP(config.vision.width, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)

    def features(self, pictures: Levels) -> mx.array:
        """uint8 [1, H, W, 3] -> image features [1, 1 + h * (w + 1), C]."""
        dtype = self.vision_tower.class_embedding.dtype
        return self.vision_tower(normalized(pictures, dtype, CLIP_MEAN, CLIP_STD))[None]


class Processor(llava.Processor):
    """LLaVA's prompt; pictures resized in their own proportion."""

    own_template = False  # its tokenizers have the language model's
    token_methods = OF_TOKENS  # there is no tower

    def draft_side(self) -> int:
        return self.config.image_size

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [H, W, 3]: the longer side is `image_size`, both are multiples of `step`."""
        size, step = self.config.image_size, self.config.step
        longer, shorter = max(image.size), min(image.size)
        other = -(-size * shorter // (longer * step)) * step
        target = (size, other) if image.width > image.height else (other, size)
        return Pixels(levels(fit(image, target, "stretch")), image.size)

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """1 + h * (w + 1): the class token, then rows that each end in a split token."""
        height, width = (side // self.config.vision.stride for side in pixels.data.shape[:2])
        return (Block(height, width, ended=True, before=1),)


FAMILY = Family(Config, Processor, Model, rename, fold, is_native)
