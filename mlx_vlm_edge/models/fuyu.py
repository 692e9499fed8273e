"""Fuyu: picture patches -> one linear layer -> Persimmon. There is no vision encoder.

Unlike LLaVA a picture keeps its shape and its size, up to 1920 x 1080: every 30 x 30 patch is a
visual token, and so is the newline that ends each row of them. The picture comes first, BOS after
it, then the text, then <0x04>, the beginning of the answer. One picture and one question at a time.
There are no roles, so tokens written in a question (|NEWLINE|) stay tokens, as in the original.
Native layout: the published one (`vision_embed_tokens.*`, `language_model.*`).
Source: transformers, models/fuyu (image_processing_pil_fuyu.py, processing_fuyu.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.config import PREPROCESSOR, first
from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..language.persimmon import LanguageModel, TextConfig
from ..picture.image import Pixels
from ..picture.preprocessing import (
    AS_PUBLISHED,
    Preprocessing,
    check_settings,
    refuse_max_tiles,
)
from ..picture.resize import Picture, levels, padded, resized
from ..picture.tiling import fit_within
from ..picture.token_budget import Block, bounds
from ..text import prompt
from ..text.tokenizer import Tokenizer
from ..timings import Steps
from ..vision.pixels import HALF, normalized
from .base import VisionLanguageModel, eos_ids
from .contract import Family

SIZE = (1920, 1080)  # what larger pictures are scaled down to fit, where no file says another
PATCH, CHANNELS = 30, 3
PADDING = 1  # raw value (of 255) right of and below the picture, as in the original
IMAGE_TOKEN, NEWLINE_TOKEN = "|SPEAKER|", "|NEWLINE|"  # an odd name; the tokenizer's own
FIXED = {  # settings of preprocessor_config.json that Fuyu has one value of
    "do_resize": True, "do_pad": True, "do_rescale": True, "do_normalize": True, "resample": 2,
    "padding_mode": "constant", "padding_value": PADDING, "image_mean": 0.5, "image_std": 0.5,
}  # fmt: skip
IMAGE_ID, NEWLINE_ID = 71011, 71019  # in adept/fuyu-8b's tokenizer
BOS, ANSWER = "<s>", "<0x04>"


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json; `source` has every key of it, known or not.

    image_size: the (width, height) that larger pictures are scaled down to fit. image_token_id and
    image_newline_id: None where the tokenizer alone tells them.
    """

    text: TextConfig
    patch_size: int
    image_size: tuple[int, int]
    image_token_id: int | None
    image_newline_id: int | None
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a config.json whose decoder's keys are its own or in `text_config`, and what the
        file of the preprocessor says.

        Raises UsageError for a missing key or an unknown value.
        """
        keys = {**config, **(config.get("text_config") or {})}
        tied = config.get("tie_word_embeddings", False)
        text = TextConfig.from_dict({**keys, "tie_word_embeddings": tied})
        patch, size = _geometry(config)
        return cls(
            text=text,
            patch_size=patch,
            image_size=size,
            image_token_id=config.get("image_token_id"),
            image_newline_id=config.get("image_newline_id"),
            eos_token_ids=eos_ids({"eos_token_id": 2, **keys}),
            context=text.max_position_embeddings,
            source=config,
        )

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same with the user's preprocessing; `resolution` limits the picture's longer side.

        Raises UsageError for values that cannot be.
        """
        refuse_max_tiles(asked)
        if asked.strategy is not None:
            raise UsageError("Fuyu takes pictures in their own shape: leave the image strategy out")
        resolution = asked.resolution
        if resolution is None:
            return self
        patch = self.patch_size
        if resolution < patch or resolution % patch:
            raise UsageError(f"image size {resolution}: Fuyu takes multiples of {patch}")
        width, height = self.image_size
        return replace(self, image_size=(min(width, resolution), min(height, resolution)))


def _geometry(config: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    """The side of a patch, and the (width, height) that pictures are scaled down to fit.

    Raises UsageError for what Fuyu's patches cannot be, and for settings that it does not have.
    """
    pixels = config.get(PREPROCESSOR) or {}
    check_settings(pixels, {})
    for key, value in FIXED.items():
        said = pixels.get(key, value)
        if any(one != value for one in (said if isinstance(said, list) else [said])):
            raise UsageError(f"preprocessor_config.json: {key} {said!r} is not known")
    patches = _sides(pixels, "patch_size", (config.get("patch_size", PATCH),) * 2)
    patch, size = config.get("patch_size", patches[0]), _sides(pixels, "size", SIZE)
    channels = config.get("num_channels", CHANNELS)
    if channels != CHANNELS or patches != (patch, patch) or any(side % patch for side in size):
        raise UsageError(
            f"config.json: patches of {patch} pixels, {channels} channels, in pictures of up to "
            f"{size[0]} x {size[1]}: not Fuyu's"
        )
    return patch, size


def _sides(config: Mapping[str, Any], key: str, default: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of {"height": 1080, "width": 1920}. Raises UsageError for another value."""
    said = config.get(key)
    if said is None:
        return default
    named = said if isinstance(said, Mapping) else {}
    width, height = named.get("width"), named.get("height")
    if type(width) is not int or type(height) is not int or min(width, height) < 1:
        raise UsageError(f"preprocessor_config.json: {key} cannot be {said!r}")
    return width, height


@dataclass(frozen=True, eq=False)
class Patches(Pixels):
    """A picture in whole patches; newline: the id of the token that ends each row of them."""

    newline: int


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these are weights of the native layout."""
    return any(name.startswith("language_model.model.") for name in weights)


def rename(name: str) -> str:
    """A native weight's name -> its parameter's."""
    return name.replace(".final_layernorm.", ".norm.", 1)


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights: nothing is folded."""
    patches = weights.take_prefix("vision_embed_tokens.")
    return {**patches, **weights.take_prefix("language_model.")}


def patchify(x: mx.array, patch: int) -> mx.array:
    """[H, W, C] -> [rows, columns, patch * patch * C]: each patch flattened by y, x, channel."""
    H, W, C = x.shape
    rows, columns = H // patch, W // patch
    x = x.reshape(rows, patch, columns, patch, C).swapaxes(1, 2)
    return x.reshape(rows, columns, patch * patch * C)


class Model(VisionLanguageModel):
    tower_name, connector_name = "vision_embed_tokens", None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden = config.text.hidden_size
        self.vision_embed_tokens = nn.Linear(config.patch_size**2 * CHANNELS, hidden)
        self.language_model = LanguageModel(config.text)

    def stages(self, pixels: Pixels) -> Steps[mx.array]:
        """Pixels of one image -> visual tokens [rows * (columns + 1), D], a newline after each row.

        The newline is the vocabulary's own token.
        """
        x = normalized(pixels.data, self.vision_embed_tokens.weight.dtype, HALF, HALF)
        tokens = self.vision_embed_tokens(patchify(x, self.config.patch_size))
        yield "vision", tokens
        rows, _, D = tokens.shape
        assert isinstance(pixels, Patches)
        newline = self.language_model.embed(mx.array([pixels.newline]))
        ends = mx.broadcast_to(newline.astype(tokens.dtype), (rows, 1, D))
        return mx.concatenate([tokens, ends], axis=1).reshape(-1, D)


class Processor(prompt.Processor):
    """The picture's rows, BOS, the text and <0x04>; without a picture BOS and the text alone."""

    stop_tokens = ("|ENDOFTEXT|",)
    image_id, newline_id = IMAGE_ID, NEWLINE_ID  # until a tokenizer says its own

    def __init__(
        self, config: Config, tokenizer: Tokenizer, asked: Preprocessing = AS_PUBLISHED
    ) -> None:
        super().__init__(config, tokenizer, asked)
        self.image_id = self._known(IMAGE_TOKEN, config.image_token_id)
        self.newline_id = self._known(NEWLINE_TOKEN, config.image_newline_id)
        self._known(ANSWER)
        self.bos_id = self._known(BOS)

    def _known(self, token: str, wanted: int | None = None) -> int:
        token_id = self.tokenizer.token_id(token)
        if token_id is None or wanted not in (None, token_id):
            raise UsageError(
                f"the tokenizer does not have {token} where the model has it: copy the "
                "tokenizer's files from the original model"
            )
        return token_id

    def draft_side(self) -> int:
        return min(self.config.image_size)

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [H, W, 3], scaled down with PIL's bilinear filter, padded to whole patches."""
        from PIL.Image import Resampling

        size, patch = fit_within(image.size, self.config.image_size), self.config.patch_size
        picture = levels(resized(image, size, Resampling.BILINEAR))
        data = padded(picture, -size[0] % patch, -size[1] % patch, PADDING)
        return Patches(data, image.size, self.newline_id)

    def render(self, messages: list[prompt.Message]) -> str:
        """The question and a line end, as Fuyu's own examples have them."""
        if len(messages) > 1:
            raise UsageError(
                "Fuyu was trained for one question and no conversation: give the question alone"
            )
        content = messages[0]["content"]
        text = "".join(part["text"] for part in content if part["type"] == "text")
        places = prompt.MARKER * sum(part["type"] != "text" for part in content)
        return places + (text if text.endswith("\n") else text + "\n")

    def split(self, text: str, images: int) -> list[str]:
        """The text alone: the picture's place is fixed, so <image> may be left out of the text."""
        if images > 1:
            raise UsageError(
                f"Fuyu was trained for one picture per question, not {images}: ask about each alone"
            )
        return ["".join(super().split(text, images))] if prompt.MARKER in text else [text]

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """Rows of patches, each with a newline."""
        rows, columns = (side // self.config.patch_size for side in pixels.data.shape[:2])
        return (Block(rows, columns, ended=True),)

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        """The lines' lengths are those of their patches or, of fewer tokens, about equal: which of
        them are newlines is written here for what looks at ids, a repetition penalty say."""
        ids: list[int] = []
        for image in pixels:
            for length in self._lines(image):
                ids += [self.image_id] * length + [self.newline_id]
        visual = np.arange(len(ids), dtype=np.int32)
        text = segments[0] + ANSWER if pixels else segments[0]
        return [*ids, self.bos_id, *self.tokenizer.encode(text, special=True)], visual

    def opening(self, segments: list[str]) -> list[int]:
        return []  # the picture comes first

    def _lines(self, pixels: Pixels) -> list[int]:
        """Patches in each line."""
        if pixels.reduction is None:
            (block,) = self.blocks(pixels)
            return [block.columns] * block.rows
        edges = [bounds(part.tokens, part.lines) for part in pixels.reduction.cuts]
        return [right - left for part in edges for left, right in pairwise(part)]


def own_tokens(config: Config) -> dict[str, int]:
    """The picture's token and the line end's."""
    return {
        IMAGE_TOKEN: first(config.image_token_id, IMAGE_ID),
        NEWLINE_TOKEN: first(config.image_newline_id, NEWLINE_ID),
    }


FAMILY = Family(Config, Processor, Model, rename, fold, is_native, own_tokens)
