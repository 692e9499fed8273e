"""ConvLLaVA: ConvNeXt of five stages -> mlp2x_gelu -> Vicuna. (side / 64) ** 2 visual tokens.

LLaVA-1.5 but for the tower, which is in the checkpoint, takes any multiple of 64 pixels, and whose
last stage goes to the connector: 144 tokens at 768 px, 256 at 1024, 576 at 1536.
Native layout: LLaVA's, with transformers' names of ConvNeXt under `vision_tower.vision_model.`,
convolutions channels-last.
Source: alibaba/conv-llava, llava/model/multimodal_encoder/convnext_encoder.py; arXiv 2405.15738.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import mlx.core as mx

from ..checkpoint.config import first
from ..checkpoint.configs.defaults import LLAMA
from ..checkpoint.weights import Weights
from ..connectors.mlp import MLP
from ..errors import UsageError
from ..language.llama import LanguageModel, TextConfig
from ..picture.image import Pixels, Strategy
from ..picture.preprocessing import (
    Preprocessing,
    chosen_strategy,
    image_strategy,
    refuse_max_tiles,
)
from ..picture.resize import Levels
from ..picture.token_budget import OF_TOKENS, Block
from ..vision.convnext import ConvNeXt, ConvNeXtConfig
from ..vision.convnext import fold as fold_vision
from ..vision.pixels import CLIP, Normal, normalized
from . import llava
from .base import VisionLanguageModel, eos_ids, with_tower
from .contract import Family

VISION = llava.VISION


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not."""

    text: TextConfig
    vision: ConvNeXtConfig
    image_strategy: Strategy
    image_token_index: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        if not isinstance(config.get("vision_config"), Mapping):
            raise UsageError("config.json lacks 'vision_config'")
        text = {**LLAMA, **(config.get("text_config") or {})}
        tied = config.get("tie_word_embeddings", False)
        vision = ConvNeXtConfig.from_dict(config["vision_config"])
        return cls(
            text=TextConfig.from_dict({**text, "tie_word_embeddings": tied}, "llama"),
            vision=vision,
            image_strategy=image_strategy(config, vision.image_size, *CLIP[:2]),
            image_token_index=config.get("image_token_index", -200),
            bos_token_id=first(config.get("bos_token_id"), llava.BOS),
            eos_token_ids=eos_ids(config),
            context=text["max_position_embeddings"],
            source=config,
        )

    @property
    def normal(self) -> Normal:
        """How pixels are normalised, and pictures padded."""
        return CLIP

    @property
    def image_size(self) -> int:
        """The side in pixels that pictures are made into."""
        return self.vision.image_size

    def adapted(self, asked: Preprocessing) -> Self:
        """The same with the user's preprocessing. Raises UsageError for values that cannot be."""
        refuse_max_tiles(asked)
        strategy = chosen_strategy(asked, self.image_strategy)
        side, stride = first(asked.resolution, self.image_size), self.vision.stride
        if side < stride or side % stride:
            raise UsageError(f"image size {side}: this ConvNeXt takes multiples of {stride}")
        return replace(self, image_strategy=strategy, vision=replace(self.vision, image_size=side))


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these weights are in the native layout: its names, and channels last."""
    patch = weights.get(f"{VISION}embeddings.patch_embeddings.weight")
    return patch is not None and patch.shape[-1] == 3


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights."""
    return with_tower(weights, fold_vision(weights, VISION, config.vision))


class Model(VisionLanguageModel):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = ConvNeXt(config.vision)
        self.mm_projector = MLP(config.vision.out_dim, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)

    def features(self, pictures: Levels) -> mx.array:
        """uint8 [B, H, W, 3] -> image features [B, H/64 * W/64, C]."""
        dtype = self.vision_tower.norm.weight.dtype
        features: mx.array = self.vision_tower(normalized(pictures, dtype, *CLIP[:2]))
        return features


class Processor(llava.Processor):
    """LLaVA-1.5's prompt and pictures, at a size that may be chosen."""

    token_methods = OF_TOKENS  # there is no attention in its tower

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        rows, columns = (side // self.config.vision.stride for side in pixels.data.shape[:2])
        return (Block(rows, columns),)


FAMILY = Family(Config, Processor, Model, llava.rename, fold, is_native)
