"""EVE-7B-HD, v2.0: two convolutions -> Qwen2 with its own weights for visual tokens.

Unlike v1 every picture is brought to about the same area, `max_size` squared, in any shape, so
that it is about 2,550 visual tokens of 32 x 32 pixels; there is no connector; and the decoder must
know where the visual tokens are, so prefill is the family's own.
Native layout: `vision_tower.*` and `language_model.*` under the published names (`moe_*`).
Source: baaivision/EVE, EVEv2; the constants are those of its preprocessor_config.json, which the
published model lacks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..language.cache import Cache
from ..language.decoder import prefill
from ..language.eve2 import LanguageModel
from ..language.llama import TextConfig
from ..picture.image import MAX_PIXELS, Pixels, fit
from ..picture.preprocessing import Preprocessing, refuse_max_tiles
from ..picture.resize import Levels, Picture, levels
from ..text import prompt
from ..text.prompt import Inputs
from ..timings import Steps
from ..vision.eve import ConvPatchEmbedding, PatchConfig
from ..vision.pixels import CLIP_MEAN, CLIP_STD, normalized
from . import eve
from .base import VisionLanguageModel, eos_ids
from .contract import Family

PATCH, WINDOW = 16, 2
MOE_PART = "layernorm-self_attn-mlp"


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not.

    image_size: the side of the square whose area pictures are brought to.
    """

    text: TextConfig
    vision: PatchConfig
    image_size: int
    image_token_index: int
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        for key, known in (("add_moe", True), ("moe_part", MOE_PART)):
            if config.get(key, known) != known:
                raise UsageError(f"config.json: {key} {config[key]!r} is not known")
        if "mm_hidden_size" not in config:
            raise UsageError("config.json lacks 'mm_hidden_size'")
        patch, window = config.get("patch_stride", PATCH), config.get("dense_stride", WINDOW)
        size = config.get("max_size") or eve.named_size(config, r".*-anyratio-res(\d+)-patch16")
        text = TextConfig.from_dict(config, "qwen2")
        return cls(
            text=text,
            vision=PatchConfig(config["mm_hidden_size"], patch, window),
            image_size=size,
            image_token_index=config.get("image_token_index", -200),
            eos_token_ids=eos_ids(config),
            context=text.max_position_embeddings,
            source=config,
        )

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same with the user's preprocessing. Raises UsageError for values that cannot be."""
        refuse_max_tiles(asked)
        eve.refuse_strategy(asked)
        resolution = asked.resolution
        if resolution is None:
            return self
        if resolution < self.vision.stride:
            raise UsageError(f"image size {resolution}: EVE takes {self.vision.stride} or more")
        return replace(self, image_size=resolution)


def rename(name: str) -> str:
    """A native weight's name -> its parameter's: `moe_` marks the weights for visual tokens.

    ...layers.3.self_attn.moe_q_proj.bias -> ...layers.3.visual.self_attn.q_proj.bias
    """
    return re.sub(r"(\.layers\.\d+\.)(.*)\bmoe_", r"\1visual.\2", name)


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights: nothing is folded."""
    return {**weights.take_prefix("vision_tower."), **weights.take_prefix("language_model.")}


class Model(VisionLanguageModel):
    language_model: LanguageModel
    connector_name = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = ConvPatchEmbedding(config.vision, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)

    def stages(self, pixels: Pixels) -> Steps[mx.array]:
        """Pixels of one image -> visual tokens [1 + h * (w + 1), D]."""
        tokens = self.image_features(pixels.data[None])[0]
        yield "vision", tokens
        return tokens

    def features(self, pictures: Levels) -> mx.array:
        """uint8 [1, H, W, 3] -> visual tokens [1, 1 + h * (w + 1), D]."""
        dtype = self.vision_tower.class_embedding.dtype
        return self.vision_tower(normalized(pictures, dtype, CLIP_MEAN, CLIP_STD))[None]

    def prefilling(self, inputs: Inputs, cache: Sequence[Cache], step_size: int) -> Steps[mx.array]:
        visual = inputs.visual

        def inside(part: slice) -> dict[str, np.ndarray]:
            here = visual[(part.start <= visual) & (visual < part.stop)]
            return {"visual": here - part.start}

        return prefill(self.language_model, self.embed(inputs), cache, step_size, inside)

    def __call__(self, inputs: Inputs) -> mx.array:
        """Logits [1, L, V] of the whole prompt, for tests and scoring."""
        return self.language_model(self.embed(inputs), visual=inputs.visual)


class Processor(eve.Processor):
    """Vicuna's words with Qwen2's <|im_end|> and no BOS; pictures of one area in any shape."""

    stop_tokens = ("<|im_end|>", "<|endoftext|>")
    answer_end = "<|im_end|>"

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [H, W, 3] of about `image_size` squared pixels, sides rounded up to whole tokens.

        Raises UsageError for an image so elongated that this takes too much memory.
        """
        stride = self.config.vision.stride
        scale = math.sqrt(image.width * image.height) / self.config.image_size
        # in floating point, as the original: a side may come out one token longer
        width, height = (math.ceil(side / scale / stride) * stride for side in image.size)
        if width * height > MAX_PIXELS:
            raise UsageError(
                f"an image of {image.width:,} x {image.height:,} pixels is too elongated: crop it"
            )
        return Pixels(levels(fit(image, (width, height), "stretch")), image.size)

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        counts = [self.visual_tokens(image) for image in pixels]
        placeholder = self.config.image_token_index
        return prompt.expand_around_images(segments, counts, self.tokenizer, placeholder)


FAMILY = Family(Config, Processor, Model, rename, fold, eve.is_native)
