"""Cambrian-1: four vision towers -> spatial vision aggregator -> Llama, which looks again.

Unlike LLaVA, every tower is shown the padded picture at its own size, and a grid of 24 x 24 queries
gathers their features; rows and columns that are padding are left out, a newline ends each row.
After every third layer of the language model visual tokens look at the same features again, so each
goes through the model with a row of what it sees. At most 600 tokens, one picture per prompt.
Native layout: published names under `language_model.` for the decoder and its samplers, and the
towers as `vision_tower.0.`, ..., by transformers' names, convolutions channels-last.
Choices that the original leaves open, and what is done: models/README.md.
Source: cambrian-mllm/cambrian; arXiv 2406.16860.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.weights import Weights
from ..connectors.sva import Aggregator, Sampler, visible
from ..errors import UsageError
from ..language.cache import Cache
from ..language.decoder import prefill
from ..language.looking import LanguageModel, Views
from ..picture.image import Pixels, fit
from ..picture.pieces import cut_out, together
from ..picture.resize import Picture, levels
from ..picture.token_budget import OF_TOKENS, Block
from ..text import prompt
from ..text.prompt import Inputs
from ..timings import Steps, result
from ..vision.pixels import normalized
from ..vision.several import Tower
from ..vision.several import fold as fold_tower
from . import llava
from .base import VisionLanguageModel, replace_prefix
from .cambrian_config import Config
from .contract import Family

BEGIN, HEADER, HEADER_END, TURN_END = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)  # fmt: skip
LLAMA_3 = {BEGIN: 128000, HEADER: 128006, HEADER_END: 128007, TURN_END: 128009}
LLAMA_3_VOCABULARY = 128256
CHATML = "<|im_start|>", "<|im_end|>"
SYSTEM = (  # with its line breaks, spaces and the one at its end, as the model was trained
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \n    "
    "As a multimodal AI, you have the ability to process and analyze images. Whenever an image is "
    "present in the conversation, very carefully examine it and consider its content when "
    "formulating your response.\n    You should give concise responses to very simple questions, "
    "but provide thorough responses to more complex and open-ended questions. "
)
PARAMETERS = {
    "mm_projector.": "aggregator.projector.layers.",
    "vision_sampler_0.": "aggregator.sampler.",
    "vision_query": "aggregator.query",
    "image_newline": "aggregator.image_newline",
}


def is_native(weights: Mapping[str, mx.array]) -> bool:
    """Whether these are weights of the native layout."""
    return "vision_query" in weights


def rename(name: str) -> str:
    """A native weight's name -> its parameter's (the vision towers' are folded instead)."""
    name = re.sub(r"mm_projector_aux_(\d+)\.", r"aggregator.projections.\1.layers.", name)
    return replace_prefix(name, PARAMETERS)


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights."""
    towers: dict[str, mx.array] = {}
    for index, view in enumerate(config.views):
        folded = fold_tower(weights, f"vision_tower.{index}.", view.tower)
        towers |= {f"vision_tower.towers.{index}.{name}": x for name, x in folded.items()}
    return {
        **towers,
        **weights.take_prefix("aggregator."),
        **weights.take_prefix("language_model."),
    }


class Towers(nn.Module):
    """All of them, each with pictures of its own size."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.towers = [Tower(view.tower) for view in config.views]

    def __call__(self, x: mx.array, index: int) -> mx.array:
        """Normalised pixels [1, H, W, 3] of one tower -> its features [1, N, C]."""
        return self.towers[index](x)


class Model(VisionLanguageModel):
    connector_name = "aggregator"
    language_model: LanguageModel

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.text.hidden_size
        self.vision_tower = Towers(config)
        self.aggregator = Aggregator(config.aggregator, width)
        samplers = {at: Sampler(config.aggregator, width) for at in config.sampler_layers}
        self.language_model = LanguageModel(config.text, samplers, config.aggregator.seen)

    def encode_image(self, pixels: Pixels) -> mx.array:
        return super().encode_image(pixels)[:, : self.config.text.hidden_size]

    def encode(self, images: Sequence[Pixels]) -> Steps[list[mx.array]]:
        """Visual tokens and beside each what it sees; the tokens alone decide which stay."""
        encoded = []
        for pixels in images:
            rows = yield from self.stages(pixels)
            if pixels.reduction is not None:
                from ..reduction import places

                width = self.config.text.hidden_size
                rows = rows[mx.array(places(rows[:, :width], pixels.reduction))]
                yield "reduce", rows[:, :width]
            encoded.append(rows)
        return encoded

    def stages(self, pixels: Pixels) -> Steps[mx.array]:
        """Pixels of one image -> visual tokens and beside each what it sees, [h * (w + 1), D + C].

        The features of a tower are a "vision" step each.
        """
        features: list[mx.array] = []
        dtype = self.aggregator.image_newline.dtype
        shown = zip(cut_out(pixels), self.config.views, strict=True)
        for index, (piece, view) in enumerate(shown):
            x = normalized(piece[None], dtype, view.mean, view.std)
            features.append(self.tower(x, index)[0])
            yield "vision", features[-1][None]
        rows: mx.array = self.connector(features, pixels.size)
        yield "connector", rows[:, : self.config.text.hidden_size]
        return rows

    def embed(self, inputs: Inputs) -> mx.array:
        width = self.config.text.hidden_size
        tokens = [rows[:, :width] for rows in self._encoded(inputs).tokens or ()]
        return super().embed(replace(inputs, tokens=tokens))

    def _encoded(self, inputs: Inputs) -> Inputs:
        """With the rows of its images, where they are not known yet."""
        if inputs.tokens is not None:
            return inputs
        return replace(inputs, tokens=result(self.encode(inputs.pixels)))

    def views(self, inputs: Inputs) -> Views:
        """Which positions of an encoded prompt look again, and what they see.

        Newlines do not. Where all tokens stay they are known by their places, of which only the
        last may be here, behind a beginning that is known already; among chosen ones by seeing
        nothing.
        """
        if not inputs.tokens:
            return Views(np.zeros((0,), np.int32), mx.zeros((0, 0)))
        (rows,), (pixels,) = inputs.tokens, inputs.pixels
        width = self.config.text.hidden_size
        seen = rows[:, width:].astype(self.language_model.model.norm.weight.dtype)
        if pixels.reduction is not None:
            looking = seen[:, -self.config.aggregator.keys :].any(axis=1)
            return Views(inputs.visual, seen, looking)
        h, w = grid(pixels, self.config)
        places = np.arange(h * (w + 1) - len(rows), h * (w + 1))
        here = np.flatnonzero(places % (w + 1) != w)
        return Views(inputs.visual[here], seen[mx.array(here)])

    def prefilling(self, inputs: Inputs, cache: Sequence[Cache], step_size: int) -> Steps[mx.array]:
        inputs = self._encoded(inputs)
        views = self.views(inputs)

        def inside(part: slice) -> dict[str, Views]:
            return {"views": views.within(part)}

        return prefill(self.language_model, self.embed(inputs), cache, step_size, inside)

    def __call__(self, inputs: Inputs) -> mx.array:
        """Logits [1, L, V] of the whole prompt, for tests and scoring."""
        inputs = self._encoded(inputs)
        return self.language_model(self.embed(inputs), views=self.views(inputs))


def grid(pixels: Pixels, config: Config) -> tuple[int, int]:
    """Rows and columns of visual tokens, without the newlines."""
    rows, columns = visible(pixels.size, config.aggregator.side)
    return max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0)


class Processor(llava.Processor):
    """The prompt of Llama 3, ChatML or Vicuna, by the vocabulary; one picture, padded."""

    stop_tokens = (TURN_END, "<|end_of_text|>", "<|im_end|>", "</s>")
    token_methods = OF_TOKENS - {"pool"}  # what a mean of tokens would see is nowhere
    own_template = False  # the published folder may have Llama 3's, which has other line breaks

    def draft_side(self) -> int:
        return max(view.tower.image_size for view in self.config.views)

    def preprocess(self, image: Picture) -> Pixels:
        """uint8 [towers, H, W, 3]: the padded picture at each tower's size.

        Raises UsageError for an image so elongated that nothing of it is left.
        """
        pieces = []
        for view in self.config.views:
            side = view.tower.image_size
            pieces.append(levels(fit(image, (side, side), "pad", view.fill)))
        pixels = together(pieces, image.size)
        if not all(grid(pixels, self.config)):
            raise UsageError(
                f"an image of {image.width:,} x {image.height:,} pixels is too elongated: crop it"
            )
        return pixels

    def split(self, text: str, images: int) -> list[str]:
        if images > 1:
            raise UsageError(
                f"Cambrian-1 was trained for one picture per prompt, not {images}: ask about each "
                "alone"
            )
        return super().split(text, images)

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """Rows of the grid, each with a newline."""
        return (Block(*grid(pixels, self.config), ended=True),)

    @property
    def _llama_3(self) -> bool:
        return self.tokenizer.token_id(HEADER) is not None

    @property
    def _chatml(self) -> bool:
        """Other vocabularies may have the tokens, but end no answer with them."""
        return self.tokenizer.token_id(CHATML[1]) in self.config.eos_token_ids

    def render(self, messages: list[prompt.Message]) -> str:
        if self._llama_3:
            turns = _turns(messages, SYSTEM)
            shown = (f"{HEADER}{role}{HEADER_END}{text}{TURN_END}" for role, text in turns)
            return f"{BEGIN}{''.join(shown)}{HEADER}assistant{HEADER_END}"
        if self._chatml:
            turns = _turns(messages, " ".join(SYSTEM.split()))
            shown = (f"{CHATML[0]}{role}\n{text}{CHATML[1]}" for role, text in turns)
            return f"{''.join(shown)}{CHATML[0]}assistant\n"
        return super().render(messages)

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        """Each segment by itself. Where the vocabulary is Llama 3's, the line break after an image
        is left out: the original's inference takes it for another BOS."""
        counts = [self.visual_tokens(image) for image in pixels]
        if self._llama_3:
            first, *rest = segments
            return self._around(
                [first if first.startswith(BEGIN) else BEGIN + first, *rest], counts
            )
        if self._chatml:
            return prompt.expand_around_images(
                segments, counts, self.tokenizer, self.config.image_token_index
            )
        return super().expand(segments, pixels)

    def _around(self, segments: list[str], counts: Sequence[int]) -> tuple[list[int], np.ndarray]:
        ids = self.tokenizer.encode(segments[0], special=True)
        visual: list[int] = []
        for places, segment in zip(counts, segments[1:], strict=True):
            visual += range(len(ids), len(ids) + places)
            ids += [self.config.image_token_index] * places
            after = self.tokenizer.encode(segment, special=True)
            ids += after[1:] if segment.startswith("\n") else after
        return ids, np.array(visual, np.int32)


def _turns(messages: list[prompt.Message], system: str) -> list[tuple[str, str]]:
    """Roles and texts, the system's first, the model's own where the chat has none."""
    turns = [(message["role"], prompt.join_parts(message["content"])) for message in messages]
    return turns if turns[0][0] == "system" else [("system", system), *turns]


def own_tokens(config: Any) -> dict[str, int]:
    """Those of Llama 3 that its prompt is written with."""
    return LLAMA_3 if config.text.vocab_size == LLAMA_3_VOCABULARY else {}


FAMILY = Family(Config, Processor, Model, rename, fold, is_native, own_tokens)
