"""LLaVA-1.5: CLIP ViT-L/14-336 -> mlp2x_gelu -> Llama. One image is 576 visual tokens.

The base case: features of the last layer but one, without the class token. The original pads a
picture to a square with its mean colour, transformers' conversions crop its centre; which of them a
checkpoint wants stands in its config (`image_aspect_ratio`) or in its preprocessor's file.
Fine-tunes have SigLIP in CLIP's place: what would leave out a class token leaves out a patch there.
Native layout: mlx-vlm's (`vision_tower.vision_model.*`, `multi_modal_projector.linear_1|2.*`,
`language_model.*`).
Source: haotian-liu/LLaVA, llava/model/llava_arch.py, conversation.py (vicuna_v1), mm_utils.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.config import first
from ..checkpoint.configs.defaults import LLAMA
from ..checkpoint.weights import Weights
from ..connectors.mlp import MLP
from ..errors import UsageError
from ..language.llama import LanguageModel, TextConfig
from ..picture.image import Pixels, Strategy, fit
from ..picture.preprocessing import (
    AS_PUBLISHED,
    Preprocessing,
    chosen_strategy,
    image_strategy,
    refuse_max_tiles,
)
from ..picture.resize import Levels, Picture, levels
from ..picture.token_budget import METHODS, OF_TOKENS, Block
from ..text import prompt
from ..text.own_words import ASKED, has_own_words
from ..text.tokenizer import Tokenizer
from ..vision.pixels import CLIP, SIGLIP, Normal, normalized
from ..vision.vit import ViT, ViTConfig
from ..vision.vit import fold as fold_vision
from .base import VisionLanguageModel, eos_ids, with_tower
from .contract import Family

VISION = "vision_tower.vision_model."
BOS = 1
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = "ASSISTANT:"  # what its answers begin with
# What `mm_vision_select_feature` and `vision_feature_select_strategy` say of the class token.
KEEPS_CLASS_TOKEN = {"patch": False, "default": False, "cls_patch": True, "full": True}


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not."""

    text: TextConfig
    vision: ViTConfig
    image_strategy: Strategy
    image_token_index: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    context: int
    keeps_class_token: bool
    projector: str
    source: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        if (activation := config.get("projector_hidden_act", "gelu")) != "gelu":
            raise UsageError(f"config.json: projector_hidden_act {activation!r} is not known")
        if "vision_config" not in config:
            raise UsageError("config.json lacks 'vision_config'")
        text = {**LLAMA, **(config.get("text_config") or {})}
        if (kind := text.get("model_type", "llama")) != "llama":
            raise UsageError(f"config.json: a text model of type {kind!r} is not known in LLaVA")
        tied = config.get("tie_word_embeddings", False)
        layer = config.get("vision_feature_layer", -2)
        vision = ViTConfig.from_dict(config["vision_config"], layer)
        return cls(
            text=TextConfig.from_dict({**text, "tie_word_embeddings": tied}, "llama"),
            vision=vision,
            image_strategy=image_strategy(config, vision.image_size, *normal(vision)[:2]),
            image_token_index=config.get("image_token_index", 32000),
            bos_token_id=first(config.get("bos_token_id"), text.get("bos_token_id"), BOS),
            eos_token_ids=eos_ids(text if config.get("eos_token_id") is None else config),
            context=text["max_position_embeddings"],
            keeps_class_token=keeps_class_token(
                config.get("vision_feature_select_strategy", "default")
            ),
            projector="mlp2x_gelu",
            source=config,
        )

    @classmethod
    def flat(cls, config: Mapping[str, Any], text: Any, projector: str) -> Self:
        """The config of a family that keeps LLaVA's own words beside its text's fields."""
        layer = config.get("mm_vision_select_layer", -2)
        vision = ViTConfig.from_dict(config["vision_config"], layer)
        return cls(
            text=text,
            vision=vision,
            image_strategy=image_strategy(config, vision.image_size, *normal(vision)[:2]),
            image_token_index=config.get("image_token_index", -200),
            bos_token_id=first(config.get("bos_token_id"), BOS),
            eos_token_ids=eos_ids(config),
            context=text.max_position_embeddings,
            keeps_class_token=keeps_class_token(config.get("mm_vision_select_feature", "patch")),
            projector=projector,
            source=config,
        )

    @property
    def normal(self) -> Normal:
        """How the tower has pixels normalised, and pictures padded."""
        return normal(self.vision)

    def adapted(self, asked: Preprocessing) -> Self:
        """The same with the user's preprocessing. Raises UsageError for values that cannot be."""
        refuse_max_tiles(asked)
        side = self.vision.image_size
        if asked.resolution not in (None, side):
            raise UsageError(f"image size {asked.resolution}: this vision tower takes {side} only")
        return replace(self, image_strategy=chosen_strategy(asked, self.image_strategy))


def normal(vision: ViTConfig) -> Normal:
    """How a tower has pixels normalised: SigLIP has no class token."""
    return CLIP if vision.class_token else SIGLIP


def keeps_class_token(feature: str) -> bool:
    """Whether the class token is a feature. Raises UsageError for a word that is not known."""
    if feature not in KEEPS_CLASS_TOKEN:
        raise UsageError(f"config.json: vision features {feature!r} are not known")
    return KEEPS_CLASS_TOKEN[feature]


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these weights are in the native layout: its names, and channels last."""
    patch = weights.get(f"{VISION}embeddings.patch_embedding.weight")
    return patch is not None and patch.shape[-1] == 3


def rename(name: str) -> str:
    """A native weight's name -> its parameter's (the vision tower's are folded instead)."""
    for number, index in ((1, 0), (2, 2)):
        name = name.replace(
            f"multi_modal_projector.linear_{number}.", f"mm_projector.layers.{index}.", 1
        )
    return name


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights."""
    return with_tower(weights, fold_vision(weights, VISION, config.vision))


class Model(VisionLanguageModel):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.vision)
        self.mm_projector = self.make_connector(config)
        self.language_model = LanguageModel(config.text)

    def make_connector(self, config: Config) -> nn.Module:
        return MLP(config.vision.hidden_size, config.text.hidden_size)

    def features(self, pictures: Levels) -> mx.array:
        """uint8 [B, H, W, 3] -> image features [B, N, C], the first row left out with either tower
        where the class token is not to be kept."""
        dtype, (mean, std, _) = self.vision_tower.position_embedding.dtype, self.config.normal
        features = self.vision_tower(normalized(pictures, dtype, mean, std))
        return features if self.config.keeps_class_token else features[:, 1:]


class Processor(prompt.Processor):
    """The v1 prompt of Vicuna: one line, BOS once at its start, </s> after each answer.

    own_template: whether a folder whose chat template writes other words is taken at its word, as
    xtuner's with Llama 3 have to be. transformers' own leaves the system text out.
    """

    stop_tokens: tuple[str, ...] = ("</s>",)
    answer_end = "</s>"
    own_template = True
    token_methods = frozenset(METHODS)

    def __init__(
        self, config: Any, tokenizer: Tokenizer, asked: Preprocessing = AS_PUBLISHED
    ) -> None:
        super().__init__(config, tokenizer, asked)
        tokenizer.begin_each_text()

    def draft_side(self) -> int:
        return self.config.vision.image_size

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [side, side, 3], by the checkpoint's strategy; padded with the tower's mean."""
        side, fill = self.config.vision.image_size, self.config.normal.fill
        fitted = fit(image, (side, side), self.config.image_strategy, fill)
        return Pixels(levels(fitted), image.size)

    @cached_property
    def own_words(self) -> bool:
        if not self.own_template:
            return False
        asked = self.vicuna(ASKED)
        return has_own_words(self, [asked, asked.removeprefix(SYSTEM)], mark=VICUNA)

    def render(self, messages: list[prompt.Message]) -> str:
        return self.by_template(messages) if self.own_words else self.vicuna(messages)

    def vicuna(self, messages: list[prompt.Message]) -> str:
        """The prompt in the family's own words."""
        system = [{"type": "text", "text": SYSTEM}]
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        text = prompt.join_parts(system) + " "
        for message in messages:
            content = prompt.join_parts(message["content"])
            if message["role"] == "system":
                raise UsageError("a system message must be the first")
            user = message["role"] == "user"
            text += f"USER: {content} " if user else f"ASSISTANT: {content}{self.answer_end}"
        return text + VICUNA

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """A square, or of SigLIP what is left of one without its first patch."""
        vision, whole = self.config.vision, self.config.keeps_class_token
        if vision.class_token:
            return (Block(vision.grid, vision.grid, before=int(whole)),)
        return (Block(vision.grid, vision.grid) if whole else Block(1, vision.grid**2 - 1),)

    @classmethod
    def methods(cls, config: Any) -> frozenset[str]:
        """Of SigLIP those that need neither a class token nor, without its first patch, squares."""
        if not isinstance(config, Config) or config.vision.class_token:
            return cls.token_methods
        return cls.token_methods & OF_TOKENS - (set() if config.keeps_class_token else {"pool"})

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        """BOS, then the segments, each tokenised by itself: the one after an image begins with
        the word mark that the tokenizer puts before every text (29871, 13 for a line break)."""
        counts = [self.visual_tokens(image) for image in pixels]
        ids, visual = prompt.expand_around_images(
            segments, counts, self.tokenizer, self.config.image_token_index
        )
        bos = self.tokenizer.token_id(self.tokenizer.named.get("bos_token", ""))
        bos = self.config.bos_token_id if bos is None else bos
        if ids[:1] == [bos]:  # written out in a raw prompt, or by a template
            return ids, visual
        return [bos, *ids], visual + 1


FAMILY = Family(Config, Processor, Model, rename, fold, is_native)
