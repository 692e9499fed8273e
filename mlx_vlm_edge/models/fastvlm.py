"""FastVLM: FastViTHD -> mlp2x_gelu -> Qwen2. One image is (side / 64) ** 2 visual tokens.

The family the runtime grew around. Unlike LLaVA-1.5 the tower is in the checkpoint, has no CLS
token and no mean/std, and its last feature map (not the second last layer) goes to the connector.
Native layout: mlx-vlm's (`vision_tower.vision_model.*`, `mm_projector.*`, `language_model.*`).
Source: apple/ml-fastvlm, llava/model/llava_arch.py, llava/conversation.py (qwen_2), mm_utils.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.config import check
from ..checkpoint.weights import Weights
from ..connectors.mlp import MLP
from ..errors import UsageError
from ..language.llama import LanguageModel, TextConfig
from ..picture.detail import auto_sides, chosen_side
from ..picture.image import Pixels, Strategy, fit
from ..picture.preprocessing import (
    Preprocessing,
    chosen_strategy,
    image_strategy,
    refuse_max_tiles,
)
from ..picture.resize import Levels, Picture, levels
from ..picture.token_budget import OF_TOKENS, Block
from ..text import prompt
from ..text.own_words import QWEN_2, chatml_forms, has_own_words
from ..vision.fastvit import STRIDE, FastViTHD, VisionConfig
from ..vision.fastvit_fold import fold as fold_vision
from ..vision.pixels import PLAIN, normalized
from .base import VisionLanguageModel, eos_ids, with_tower
from .contract import Family

VISION = "vision_tower.vision_model."
ONLY = {  # settings of LLaVA that FastVLM has one value of
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not."""

    text: TextConfig
    vision: VisionConfig
    image_size: int
    image_strategy: Strategy
    image_token_index: int
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)
    sides: tuple[int, ...] = ()  # of which one is chosen for each picture, where that is asked for

    def __post_init__(self) -> None:
        check(self)
        if self.image_size < STRIDE or self.image_size % STRIDE:
            raise UsageError(f"image size {self.image_size}: FastViTHD takes multiples of {STRIDE}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        for key, only in ONLY.items():
            if config.get(key) not in (None, only):
                raise UsageError(f"config.json: {key} {config[key]!r} is not known")
        if not isinstance(config.get("vision_config"), Mapping):
            raise UsageError("config.json lacks 'vision_config'")
        text = TextConfig.from_dict(config, "qwen2")
        side = config["vision_config"].get("image_size", 1024)
        return cls(
            text=text,
            vision=_vision(config["vision_config"]),
            image_size=side,
            image_strategy=image_strategy(config, side, *PLAIN[:2]),
            image_token_index=config.get("image_token_index", -200),
            eos_token_ids=eos_ids(config),
            context=text.max_position_embeddings,
            source=config,
        )

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same with the user's preprocessing. Raises UsageError for values that cannot be."""
        refuse_max_tiles(asked)
        strategy = chosen_strategy(asked, self.image_strategy)
        size = self.image_size if asked.resolution is None else asked.resolution
        sides = auto_sides(self.image_size, STRIDE, asked.largest) if asked.auto else ()
        return replace(self, image_strategy=strategy, image_size=size, sides=sides)


def _vision(config: Mapping[str, Any]) -> VisionConfig:
    known = {item.name for item in fields(VisionConfig)}
    lists = {key: value for key, value in config.items() if key in known}
    return VisionConfig(**{key: _frozen(value) for key, value in lists.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these are weights of the native layout."""
    return any(name.startswith(f"{VISION}patch_embed.blocks.") for name in weights)


def rename(name: str) -> str:
    """A native weight's name -> its parameter's (the vision tower's are folded instead)."""
    return name.replace("mm_projector.", "mm_projector.layers.", 1)


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights; the vision tower's in float32."""
    return with_tower(weights, fold_vision(weights, VISION, config.vision))


class Model(VisionLanguageModel):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = FastViTHD(config.vision)
        self.mm_projector = MLP(config.vision.out_dim, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)

    def features(self, pictures: Levels) -> mx.array:
        """uint8 [B, H, W, 3] -> image features [B, H / 64 * W / 64, C]."""
        return self.vision_tower(normalized(pictures, self.vision_tower.stem.conv.weight.dtype))


class Processor(prompt.Processor):
    """The qwen_2 prompt: no BOS, every turn between <|im_start|> and <|im_end|>; a fine-tuned
    model's own where the folder's chat template writes another."""

    stop_tokens = ("<|im_end|>", "<|endoftext|>")
    chooses_side = True
    token_methods = OF_TOKENS | {"hiprune"}  # by the last stage's two blocks

    def draft_side(self) -> int:
        return max((self.config.image_size, *self.config.sides))

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [side, side, 3], by the checkpoint's strategy; padded black, before the resize."""
        side, strategy = self.config.image_size, self.config.image_strategy
        if self.config.sides:
            length = min(image.size) if strategy == "center_crop" else max(image.size)
            side = chosen_side(image, self.config.sides, length)
        return Pixels(levels(fit(image, (side, side), strategy)), image.size)

    @cached_property
    def own_words(self) -> bool:
        return has_own_words(self, chatml_forms(), [QWEN_2])

    def render(self, messages: list[prompt.Message]) -> str:
        return self.by_template(messages) if self.own_words else prompt.chatml(messages, SYSTEM)

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        height, width = pixels.data.shape[:2]
        return (Block(height // STRIDE, width // STRIDE),)

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        counts = [self.visual_tokens(image) for image in pixels]
        placeholder = self.config.image_token_index
        return prompt.expand_around_images(segments, counts, self.tokenizer, placeholder)


FAMILY = Family(Config, Processor, Model, rename, fold, is_native)
