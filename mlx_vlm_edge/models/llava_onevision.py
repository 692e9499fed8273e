"""LLaVA-OneVision: SigLIP on square tiles -> mlp2x_gelu -> Qwen2; 729 to 8,765 tokens per image.

Unlike LLaVA-1.5, a lone image is seen twice: whole, stretched to one tile, and cut into up to 6 x 6
tiles. The tiles' features are put together, their padding is cut off, more than 9 tiles' worth is
shrunk, and a learned newline token ends each row. One of several images is padded to a single tile.
Native layout: mlx-vlm's (`vision_tower.vision_model.*`, `multi_modal_projector.linear_*`,
`image_newline`, `language_model.*`; transformers' names, convolutions NHWC).
Source: LLaVA-VL/LLaVA-NeXT, llava/model/llava_arch.py, llava/mm_utils.py, llava/train/train.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoint.config import PREPROCESSOR
from ..checkpoint.weights import Weights
from ..connectors.mlp import MLP
from ..errors import UsageError
from ..kernels import resize_bilinear
from ..language.llama import LanguageModel, TextConfig
from ..picture.image import Pixels, fit
from ..picture.preprocessing import (
    CLIP_SETTINGS,
    Preprocessing,
    check_normalised,
    check_settings,
)
from ..picture.resize import Levels, Picture, levels
from ..picture.tiling import Box, Size, Tiles, anyres_tiles, best_resolution, capped, unpad
from ..picture.token_budget import OF_TOKENS, Block
from ..text import prompt
from ..text.own_words import ASKED, QWEN_2, chatml_forms, has_own_words
from ..timings import Steps
from ..vision.pixels import HALF, normalized
from ..vision.vit import ViT, ViTConfig
from ..vision.vit import fold as fold_vision
from .base import VisionLanguageModel, eos_ids
from .contract import Family

VISION = "vision_tower.vision_model."
PATCHES = f"{VISION}embeddings.patch_embedding.weight"
CONNECTOR = "multi_modal_projector."
LAYERS = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
# The tower of every published model: transformers leaves out what equals its defaults.
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
GRID_SIDE = 6  # of the largest grid of tiles, where a config lists none
STRATEGIES = ("anyres", "pad")
PADDING = (127, 127, 127)  # int(255 * 0.5), the processor's mean; tiles are padded black
SYSTEM = "You are a helpful assistant."
TILES_AT_ONCE = 4  # in the vision tower, so that its activations do not grow with the image
FIXED = {
    "vision_feature_select_strategy": "full",
    "projector_hidden_act": "gelu",
    "use_image_newline_parameter": True,
    "multimodal_projector_bias": True,
}


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not.

    resolutions: (width, height) of the grids of tiles. max_tiles: beyond as many tiles' features,
    they are shrunk. image_strategy: None tiles a lone image, "anyres" every one, "pad" none.
    """

    text: TextConfig
    vision: ViTConfig
    resolutions: tuple[Size, ...]
    max_tiles: int
    image_token_index: int
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)
    image_strategy: str | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise UsageError(f"config.json: {key} {config[key]!r} is not known")
        if not isinstance(config.get("text_config"), Mapping):
            raise UsageError("config.json lacks 'text_config'")
        text = dict(config["text_config"])
        if text.get("model_type", "qwen2") != "qwen2":
            raise UsageError(f"text_config: model_type {text['model_type']!r} is not known")
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
        layer = config.get("vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise UsageError(f"config.json: vision_feature_layer {layer!r} is not known")
        vision = {**SIGLIP, **(config.get("vision_config") or {})}
        parsed = TextConfig.from_dict(text, "qwen2")
        resolutions = _resolutions(config.get("image_grid_pinpoints"), vision["image_size"])
        _check_pixels(config.get(PREPROCESSOR) or {}, vision["image_size"], resolutions)
        return cls(
            text=parsed,
            vision=ViTConfig.from_dict(vision, layer),
            resolutions=resolutions,
            max_tiles=_max_tiles(config.get("vision_aspect_ratio", "anyres_max_9")),
            image_token_index=config.get("image_token_index", 151646),
            eos_token_ids=eos_ids(text if config.get("eos_token_id") is None else config),
            context=parsed.max_position_embeddings,
            source=config,
        )

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same with the user's preprocessing. Raises UsageError for values that cannot be."""
        if asked.strategy not in (None, *STRATEGIES):
            raise UsageError(
                f"image strategy {asked.strategy!r} is not one of {', '.join(STRATEGIES)}, which "
                "is what LLaVA-OneVision has"
            )
        side = self.vision.image_size
        if asked.resolution not in (None, side):
            raise UsageError(
                f"image size {asked.resolution}: LLaVA-OneVision's tiles are {side} pixels "
                " wide; make the image smaller for fewer of them"
            )
        chosen = replace(self, image_strategy=asked.strategy or self.image_strategy)
        return chosen if asked.max_tiles is None else chosen.limited(asked.max_tiles)

    def limited(self, tiles: int) -> "Config":
        """The same without the grids that make more than `tiles` tiles, the whole image included.

        When none is left, every image is padded to one tile.
        """
        if tiles < 1:
            raise UsageError(f"max tiles {tiles}: an image is at least one tile")
        side = self.vision.image_size
        fitting = tuple(
            (width, height)
            for width, height in self.resolutions
            if (width // side) * (height // side) < tiles
        )
        if not fitting:
            return replace(self, image_strategy="pad")
        return replace(self, resolutions=fitting)


def default_pinpoints(side: int) -> list[list[int]]:
    """[height, width] of every grid from 1 x 1 to 6 x 6 tiles."""
    lengths = [side * (n + 1) for n in range(GRID_SIDE)]
    return [[height, width] for height in lengths for width in lengths]


def _resolutions(pinpoints: Any, side: int) -> tuple[Size, ...]:
    """[[height, width], ...] -> ((width, height), ...); the default ones where there are none."""
    pinpoints = default_pinpoints(side) if pinpoints is None else pinpoints
    if not isinstance(pinpoints, list) or not pinpoints or not all(map(_is_pair, pinpoints)):
        raise UsageError("config.json: image_grid_pinpoints is no list of [height, width]")
    if any(length < side or length % side for pair in pinpoints for length in pair):
        raise UsageError(f"config.json: image_grid_pinpoints are no multiples of {side}")
    return tuple((width, height) for height, width in pinpoints)


def _check_pixels(file: Mapping[str, Any], side: int, resolutions: tuple[Size, ...]) -> None:
    """Raises UsageError when preprocessor_config.json asks for other pixels than ours."""
    check_settings(file, CLIP_SETTINGS)
    check_normalised(file, HALF, HALF)
    size, grids = file.get("size") or side, file.get("image_grid_pinpoints")
    lengths = size.values() if isinstance(size, Mapping) else [size]
    if any(length not in (side, None) for length in lengths):
        raise UsageError(f"preprocessor_config.json: size {size}, but tiles are {side} pixels wide")
    if grids is not None and _resolutions(grids, side) != resolutions:
        raise UsageError("preprocessor_config.json: image_grid_pinpoints are not config.json's")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and [type(n) for n in item] == [int, int]


def _max_tiles(aspect: str) -> int:
    """The 9 of "anyres_max_9"."""
    match = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect))
    if not match:
        raise UsageError(f"config.json: vision_aspect_ratio {aspect!r} is not known")
    return int(match[1])


class Packing(NamedTuple):
    """How the features of an image's tiles become rows of tokens.

    picture: where the image is in them. remaining: its rows and columns after it is shrunk, before
    a newline ends each row.
    """

    picture: Box
    remaining: Size


def packing(pixels: Tiles, config: Config) -> Packing:
    """Where an image is in its tiles' features, and how many of those remain.

    640 x 480 in 2 x 2 tiles of 384: 54 x 54 features, 40 x 54 of them are the picture.
    """
    grid = config.vision.grid
    picture = unpad(pixels.size, (pixels.rows * grid, pixels.columns * grid))
    return Packing(picture, capped(picture.height, picture.width, config.max_tiles * grid**2))


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these are weights of the native layout; the Hub's differs in one tensor's axes."""
    return PATCHES in weights and weights[PATCHES].shape[-1] == 3


def rename(name: str) -> str:
    """A native weight's name -> its parameter's (the vision tower's are folded instead)."""
    for source, layer in LAYERS.items():
        name = name.replace(CONNECTOR + source, CONNECTOR + layer, 1)
    return name


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights."""
    vision = fold_vision(weights, VISION, config.vision)
    return {
        **{f"vision_tower.{name}": array for name, array in vision.items()},
        "image_newline": weights.take("image_newline", config.text.hidden_size),
        **weights.take_prefix(CONNECTOR),
        **weights.take_prefix("language_model."),
    }


class Model(VisionLanguageModel):
    connector_name = "multi_modal_projector"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = ViT(config.vision)
        self.multi_modal_projector = MLP(config.vision.hidden_size, config.text.hidden_size)
        self.image_newline = mx.zeros((config.text.hidden_size,))
        self.language_model = LanguageModel(config.text)

    def stages(self, pixels: Pixels) -> Steps[mx.array]:
        """Pixels of one image, uint8 [tiles, side, side, 3] -> visual tokens [N, D]."""
        features = self.image_features(pixels.data)
        yield "vision", features
        tokens = self.pack(self.connector(features), pixels, self.image_newline)
        yield "connector", tokens
        return tokens

    def features(self, tiles: Levels) -> mx.array:
        """uint8 [tiles, side, side, 3] -> image features [tiles, N, C], a few tiles at a time."""
        dtype = self.vision_tower.position_embedding.dtype
        features: list[mx.array] = []
        for start in range(0, len(tiles), TILES_AT_ONCE):
            mx.eval(features[-1:])  # so that one batch's activations are held, not all
            batch = tiles[start : start + TILES_AT_ONCE]
            features.append(self.vision_tower(normalized(batch, dtype, HALF, HALF)))
        return mx.concatenate(features)

    def token_scores(self, seen: mx.array, pixels: Pixels) -> mx.array:
        return self.pack(seen[:, :, None], pixels, mx.zeros((1,)))[:, 0]

    def pack(self, tokens: mx.array, pixels: Pixels, newline: mx.array) -> mx.array:
        """Tokens [tiles, N, D] of an image -> [N + rows * (columns + 1), D].

        The whole image's, then the picture row by row with a newline after each; a lone tile's,
        then one newline.
        """
        newline = newline.astype(tokens.dtype)[None]
        if not isinstance(pixels, Tiles):
            return mx.concatenate([tokens[0], newline])
        n, rows, columns = self.config.vision.grid, pixels.rows, pixels.columns
        (top, left, height, width), remaining = packing(pixels, self.config)
        grid = tokens[1:].reshape(rows, columns, n, n, -1).swapaxes(1, 2)  # [rows, n, columns, n]
        grid = grid.reshape(rows * n, columns * n, -1)[top : top + height, left : left + width]
        if remaining != (height, width):
            grid = resize_bilinear(grid, *remaining)
        newlines = mx.broadcast_to(newline, (remaining[0], 1, newline.shape[1]))
        lines = mx.concatenate([grid, newlines], axis=1)
        return mx.concatenate([tokens[0], lines.flatten(0, 1)])


class Processor(prompt.Processor):
    """The qwen_1_5 prompt, with the system turn that the model was trained with and transformers'
    template leaves out; a fine-tuned model's own where the folder's chat template writes another.
    """

    stop_tokens = ("<|im_end|>", "<|endoftext|>")
    token_methods = OF_TOKENS | {"hiprune"}

    def preprocessor(self, images: int) -> Callable[[Picture], Pixels]:
        """A lone image is tiled, one of several is not, as in training (unless told otherwise)."""
        strategy = self.config.image_strategy or ("anyres" if images == 1 else "pad")
        return self.preprocess if strategy == "anyres" else self.single_tile

    def draft_side(self) -> int:
        return max(max(size) for size in self.config.resolutions)

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [1 + tiles, side, side, 3]: the whole image, then its parts."""
        side, resolutions = self.config.vision.image_size, self.config.resolutions
        width, height = best_resolution(image.size, resolutions)
        tiles = anyres_tiles(image, side, resolutions)
        return Tiles(tiles, image.size, rows=height // side, columns=width // side)

    def single_tile(self, image: Picture) -> Pixels:
        """uint8 [1, side, side, 3]: padded to a square with grey."""
        side = self.config.vision.image_size
        return Pixels(levels(fit(image, (side, side), "pad", PADDING))[None], image.size)

    @cached_property
    def own_words(self) -> bool:
        with_system = prompt.chatml(ASKED, SYSTEM)
        without = with_system[with_system.index("<|im_start|>user") :]
        return has_own_words(self, [*chatml_forms(), without], [QWEN_2])

    def render(self, messages: list[prompt.Message]) -> str:
        return self.by_template(messages) if self.own_words else prompt.chatml(messages, SYSTEM)

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """The whole image, one newline behind it where it is alone, and rows with theirs."""
        side = self.config.vision.grid
        if not isinstance(pixels, Tiles):
            return (Block(side, side, after=1),)
        rows, columns = packing(pixels, self.config).remaining
        return Block(side, side), Block(rows, columns, ended=True)

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        counts = [self.visual_tokens(image) for image in pixels]
        placeholder = self.config.image_token_index
        return prompt.expand_around_images(segments, counts, self.tokenizer, placeholder)


FAMILY = Family(Config, Processor, Model, rename, fold, is_native)
