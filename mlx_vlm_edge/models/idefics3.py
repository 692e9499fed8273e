"""Idefics3 and SmolVLM: SigLIP on tiles -> pixel shuffle -> Llama. Up to 17 tiles per image.

Unlike LLaVA, an image is enlarged and cut into tiles, each introduced by its row and column; the
whole image comes last, as one more tile; the prompt is tokenised as one text. SmolVLM2 takes
videos: frames of one tile each, with their time. Both model types are one architecture.
Native layout: mlx-vlm's (`vision_model.*`, `connector.modality_projection.proj`,
`language_model.*` without a `model.` in it, convolutions NHWC).
Source: transformers, models/idefics3 and models/smolvlm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.weights import Weights
from ..connectors.pixel_shuffle import PixelShuffle
from ..errors import UsageError
from ..language.llama import LanguageModel
from ..picture.image import Pixels
from ..picture.preprocessing import AS_PUBLISHED, Preprocessing
from ..picture.resize import Levels, Picture
from ..picture.tiling import Tiles, affordable_edge, single, split, split_grid
from ..picture.token_budget import OF_TOKENS, Block
from ..picture.video import Video, number_in_words, read_video
from ..text import prompt
from ..text.own_words import ASKED, IDEFICS, has_own_words
from ..text.tokenizer import Tokenizer
from ..timings import Steps
from ..vision.pixels import normalized
from ..vision.positions import positions as grid_positions
from ..vision.vit import ViT, ViTConfig
from ..vision.vit import fold as fold_vision
from .base import VisionLanguageModel, replace_prefix
from .contract import Family
from .idefics3_config import MARKED, Config

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
END = "<end_of_utterance>"
BATCH_BYTES = 512 << 20  # activations of the vision tower that are held at once, about
PARAMETERS = {
    "connector.": "",
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
        **weights.take_prefix("modality_projection."),
        **weights.take_prefix("language_model."),
    }


@dataclass(frozen=True, eq=False)
class Frames(Pixels):
    """A video's frames, one tile each, with the second each is from and the video's length."""

    kind = "video"
    times: tuple[float, ...] = ()
    duration: float = 0.0


class Model(VisionLanguageModel):
    tower_name, connector_name = "vision_model", "modality_projection"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.vision.hidden_size
        self.vision_model = ViT(config.vision)
        self.modality_projection = PixelShuffle(width, config.text.hidden_size, config.scale_factor)
        self.language_model = LanguageModel(config.text)

    def stages(self, pixels: Pixels) -> Steps[mx.array]:
        """Pixels of one image or video, uint8 [tiles, H, W, 3] -> visual tokens [tiles * N, D].

        Tiles go through the tower a few at a time, so that memory does not grow with them.
        """
        tokens: list[mx.array] = []
        step = tiles_at_once(self.config.vision, pixels.data.shape[1:3])
        for start in range(0, len(pixels.data), step):
            mx.eval(tokens[-1:])
            features = self.image_features(pixels.data[start : start + step])
            yield "vision", features
            tokens.append(self.connector(features).reshape(-1, self.config.text.hidden_size))
            yield "connector", tokens[-1]
        return tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)

    def features(self, tiles: Levels) -> mx.array:
        """uint8 [B, H, W, 3] -> image features [B, N, C]."""
        config = self.config.vision
        rows, columns = (edge // config.patch_size for edge in tiles.shape[1:3])
        positions = None
        if (rows, columns) != (config.grid, config.grid):
            positions = grid_positions(rows, columns, config.grid)
        dtype = self.vision_model.position_embedding.dtype
        x = normalized(tiles, dtype, self.config.mean, self.config.std)
        return self.vision_model(x, positions)


def tiles_at_once(config: ViTConfig, shape: tuple[int, ...]) -> int:
    """How many tiles of that height and width the tower takes together, by BATCH_BYTES in float32.

    A layer holds attention scores (where attention is not fused) and the inner layer beside
    about eight arrays of its width: some 90 MB for a SmolVLM-256M tile, so 5 at once.
    """
    patches = (shape[0] // config.patch_size) * (shape[1] // config.patch_size)
    per_patch = config.num_attention_heads * patches + 2 * config.intermediate_size
    return max(1, BATCH_BYTES // (4 * patches * (per_patch + 8 * config.hidden_size)))


class Processor(prompt.Processor):
    """Turns `User: ...<end_of_utterance>`; a tile is its marker and an <image> per visual token."""

    stop_tokens = (END,)
    token_methods = OF_TOKENS | {"hiprune"}

    def __init__(
        self, config: Any, tokenizer: Tokenizer, asked: Preprocessing = AS_PUBLISHED
    ) -> None:
        super().__init__(config, tokenizer, asked)
        image, around = tokenizer.token_id(IMAGE), tokenizer.token_id(AROUND)
        if image is None or around is None:
            raise UsageError(f"the tokenizer has no {IMAGE} or no {AROUND}: it is another model's")
        self.image_id = image
        self.bos = tokenizer.named.get("bos_token", "")
        # What the tokenizer itself puts in front of a text (Idefics3's does, SmolVLM's does not).
        self.prefix: list[int] = tokenizer.backend.encode("", add_special_tokens=True).ids[:1]

    def read(self, source: Any, preprocess: prompt.Preprocess) -> Steps[Pixels]:
        if not isinstance(source, Video):
            return (yield from super().read(source, preprocess))
        sampling = self.config.video
        if sampling is None:
            raise UsageError("this model was not trained on videos: use SmolVLM2 (smolvlm2-500m)")
        edge, tile = sampling.longest_edge, self.config.tile
        clip = read_video(
            source, sampling.fps, sampling.max_frames, lambda frame: single(frame, edge, tile)
        )
        yield "image decode", clip  # frames are preprocessed as they come: no two are held
        tiles = np.concatenate(clip.frames)
        yield "preprocess", tiles
        return Frames(tiles, clip.size, tuple(clip.times), clip.duration)

    def draft_side(self) -> int:
        return self.config.longest_edge

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [tiles, tile, tile, 3]."""
        config, longest = self.config, self.config.longest_edge
        if config.strategy == "stretch":
            return Tiles(single(image, longest, config.tile), image.size)
        if config.strategy == "no-upscale":
            longest = min(longest, max(image.size))
        if config.max_tiles:
            longest = affordable_edge(image.size, longest, config.tile, config.max_tiles)
        rows, columns = split_grid(image.size, longest, config.tile)
        if max(rows, columns) > MARKED:
            raise UsageError(
                f"an image of {image.width} x {image.height} makes {rows} x {columns} tiles, more "
                f"than the {MARKED} in a row that the model knows: give a smaller --resolution"
            )
        tiles = split(image, longest, config.tile)
        return Tiles(tiles, image.size, rows, columns)

    @cached_property
    def own_words(self) -> bool:
        return has_own_words(self, [self.turns(ASKED)], [IDEFICS], mark=END)

    def render(self, messages: list[prompt.Message]) -> str:
        if self.own_words:  # a fine-tuned model's
            return self.by_template(messages)
        return self.bos + self.turns(messages)

    def turns(self, messages: list[prompt.Message]) -> str:
        """Messages in the family's own words, without BOS."""
        return "".join(map(_turn, messages)) + "Assistant:"

    def tile_grid(self, pixels: Pixels) -> tuple[int, int]:
        """Rows and columns of a tile's visual tokens: 8 x 8 of 512 x 512 pixels in SmolVLM-256M."""
        step = self.config.vision.patch_size
        scale = self.config.scale_factor
        rows, columns = (edge // step // scale for edge in pixels.data.shape[1:3])
        return rows, columns

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """Every tile by itself: each has its own place in the prompt, behind its marker."""
        rows, columns = self.tile_grid(pixels)
        return (Block(rows, columns),) * len(pixels.data)

    def tile_counts(self, pixels: Pixels) -> list[int]:
        """Visual tokens of each tile."""
        if pixels.reduction is not None:
            return [part.total for part in pixels.reduction.cuts]
        return [block.total for block in self.blocks(pixels)]

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        """One text with a marker per tile, tokenised once; then each marker as often as needed."""
        row = self.tokenizer.encode(self.write_out(segments, pixels), special=True)
        if row[:1] != self.prefix:
            row = self.prefix + row
        counts = iter([count for item in pixels for count in self.tile_counts(item)])
        ids: list[int] = []
        visual: list[int] = []
        for token in row:
            count = next(counts) if token == self.image_id else 1
            if token == self.image_id:
                visual += range(len(ids), len(ids) + count)
            ids += [token] * count
        return ids, np.array(visual, np.int32)

    def write_out(self, segments: list[str], pixels: list[Pixels]) -> str:
        """The prompt as one text, with what stands for each image and one <image> per tile."""
        blocks = [_text_of(item) for item in pixels]
        return segments[0] + "".join(chain(*zip(blocks, segments[1:], strict=True)))


def _turn(message: prompt.Message) -> str:
    """`User:<image>What is it?<end_of_utterance>`; a space first unless an image comes first."""
    parts = message["content"]
    gap = "" if parts and parts[0]["type"] == "image" else " "
    said = "".join(part["text"] if part["type"] == "text" else IMAGE for part in parts)
    return f"{message['role'].capitalize()}:{gap}{said}{END}\n"


def _text_of(pixels: Pixels) -> str:
    """What stands for an image or a video in the text, with one <image> per tile."""
    whole = f"{AROUND}{WHOLE}{IMAGE}{AROUND}"
    if isinstance(pixels, Frames):
        length = timedelta(seconds=int(pixels.duration))
        frames = (f"\nFrame from {_clock(second)}:{whole}" for second in pixels.times)
        intro = (
            f"You are provided the following series of {number_in_words(len(pixels.times))} frames "
            f"from a {length} [H:MM:SS] video.\n"
        )
        return intro + "".join(frames) + "\n\n"
    if not isinstance(pixels, Tiles) or not pixels.rows:
        return whole
    lines = (
        "".join(f"{AROUND}<row_{row + 1}_col_{col + 1}>{IMAGE}" for col in range(pixels.columns))
        for row in range(pixels.rows)
    )
    return "".join(f"{line}\n" for line in lines) + f"\n{whole}"


def _clock(seconds: float) -> str:
    """65.4 -> "01:05"."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


FAMILY = Family(Config, Processor, Model, rename, fold, is_native)
