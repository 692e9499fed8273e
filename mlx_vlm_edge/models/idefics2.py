"""Idefics2: SigLIP at a picture's own aspect ratio -> perceiver resampler -> Mistral. 64 tokens.

Unlike LLaVA, a picture keeps its shape, between 378 and 980 pixels a side, and becomes 64 visual
tokens whatever its size; split, its four quarters and the whole are five pictures of 64 tokens.
Each goes through the tower by itself, so that nothing is padded and no mask is needed. The prompt
is Idefics3's, with other marks around an image.
Native layout: mlx-vlm's (`vision_model.*`, `connector.*`, `language_model.*` without a `model.` in
it, convolutions NHWC).
Source: transformers, models/idefics2; arXiv 2405.02246.
"""

from collections.abc import Mapping

import mlx.core as mx

from ..checkpoint.weights import Weights
from ..connectors.perceiver import Perceiver
from ..language.llama import LanguageModel
from ..picture.image import Pixels
from ..picture.pieces import cut_out, together
from ..picture.resize import Levels, Picture, levels
from ..picture.resize import resized as resized_picture
from ..picture.token_budget import OF_TOKENS, Block
from ..text import prompt
from ..timings import Steps
from ..vision.pixels import HALF, normalized
from ..vision.positions import positions as grid_positions
from ..vision.vit import ViT
from ..vision.vit import fold as fold_vision
from . import idefics3
from .base import VisionLanguageModel, replace_prefix
from .contract import Family
from .idefics2_config import Config
from .idefics3 import AROUND, IMAGE

Size = tuple[int, int]
PARAMETERS = {
    "language_model.lm_head.": "language_model.lm_head.",
    "language_model.": "language_model.model.",
}


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these are weights of the native layout."""
    return any(name.startswith("vision_model.embeddings.") for name in weights)


def rename(name: str) -> str:
    """A native weight's name -> its parameter's (the vision tower's are folded instead)."""
    return replace_prefix(name, PARAMETERS)


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights."""
    vision = fold_vision(weights, "vision_model.", config.vision)
    return {
        **{f"vision_model.{name}": array for name, array in vision.items()},
        **weights.take_prefix("connector."),
        **weights.take_prefix("language_model."),
    }


class Model(VisionLanguageModel):
    tower_name, connector_name = "vision_model", "connector"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_model = ViT(config.vision)
        self["connector"] = Perceiver(config.vision.hidden_size, config.perceiver)
        self.language_model = LanguageModel(config.text)

    def stages(self, pixels: Pixels) -> Steps[mx.array]:
        """Pixels of one image, uint8 [pieces, H, W, 3] -> visual tokens [pieces * 64, D].

        Piece after piece: 4,900 patches at a time are work enough, and memory.
        """
        tokens: list[mx.array] = []
        for piece in cut_out(pixels):
            mx.eval(tokens[-1:])
            features = self.image_features(piece[None])
            yield "vision", features
            tokens.append(self.connector(features)[0])
            yield "connector", tokens[-1]
        return tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)

    def features(self, pictures: Levels) -> mx.array:
        """uint8 [B, H, W, 3] -> image features [B, N, C]; what fills no patch is not seen."""
        vision = self.config.vision
        rows, columns = (edge // vision.patch_size for edge in pictures.shape[1:3])
        positions = grid_positions(rows, columns, vision.grid)
        dtype = self.vision_model.position_embedding.dtype
        features: mx.array = self.vision_model(normalized(pictures, dtype, HALF, HALF), positions)
        return features


def resized(size: Size, longest: int, shortest: int) -> Size:
    """(width, height) of a picture as the tower sees it.

    resized((1920, 1080), 980, 378) -> (980, 551); resized((3000, 500), 980, 378) -> (980, 378):
    a side that is too short is stretched by itself.
    """
    width, height = size
    ratio = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / ratio)
    elif height > width and height > longest:
        width, height = int(longest * ratio), longest
    return max(width, shortest), max(height, shortest)


def quarters(size: Size) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of a picture's quarters, row by row, and of the whole."""
    width, height = size
    across, down = width // 2, height // 2
    return [
        (0, 0, across, down),
        (across, 0, width, down),
        (0, down, across, height),
        (across, down, width, height),
        (0, 0, width, height),
    ]


class Processor(idefics3.Processor):
    """Idefics3's turns; a piece is as many <image> between marks, of which neighbours share one."""

    read = prompt.Processor.read
    token_methods = OF_TOKENS - {"pool"}  # latents have no neighbours

    def draft_side(self) -> int:
        edge: int = self.config.longest_edge
        return 2 * edge if self.config.strategy == "split" else edge

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [pieces, H, W, 3]: the quarters, cut before they are resized, and the whole."""
        from PIL.Image import Resampling

        config = self.config
        split = config.strategy == "split" and min(image.size) > 1
        parts = [image.crop(box) for box in quarters(image.size)] if split else [image]
        pieces = [
            levels(
                resized_picture(
                    part,
                    resized(part.size, config.longest_edge, config.shortest_edge),
                    Resampling.BILINEAR,
                )
            )
            for part in parts
        ]
        return together(pieces, image.size)

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """Latents, which lie nowhere in the picture."""
        return (Block(1, self.config.perceiver.latents),) * len(pixels.data)

    def write_out(self, segments: list[str], pixels: list[Pixels]) -> str:
        """Every piece between marks; two marks that meet become one."""
        text = segments[0]
        for item, segment in zip(pixels, segments[1:], strict=True):
            text += f"{AROUND}{IMAGE}{AROUND}" * len(item.data) + segment
        return text.replace(AROUND * 2, AROUND)


FAMILY = Family(Config, Processor, Model, rename, fold, is_native)
