"""A question or chat messages, and images -> token ids with image placeholders already expanded.

Here is the order of the work; how an image looks to the model, how a chat is written and how
placeholders are placed belong to the family (LLaVA tokenises around each image, Idefics3 one
whole text, Fuyu puts the image before BOS).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..picture.check import refuse_remote
from ..picture.image import Pixels, open_picture
from ..picture.preprocessing import AS_PUBLISHED, Preprocessing
from ..picture.resize import Picture, begin
from ..picture.token_budget import (
    ATTENDED,
    OF_TOKENS,
    Block,
    TokenBudget,
    check_method,
    planned,
)
from ..picture.video import Video
from ..timings import Steps, result
from .chat_template import render_chat_template, takes_parts
from .guard import GUARD, split_unmarked, unmarked
from .messages import Message as Message
from .messages import count, normalize
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

MARKER = "<image>"
PLACES = unmarked([MARKER])
# How control tokens are written; a vocabulary without one that a chat has would spell it out.
CONTROL = re.compile(r"<\|[^<>|\s]+\|>|</?s>|<end_of_utterance>")
# The longest token of the vocabularies we know, 128 spaces of Qwen2's.
CHARACTERS_PER_TOKEN = 128
Preprocess = Callable[[Picture], Pixels]


@dataclass(frozen=True, eq=False)
class Inputs:
    """A prompt as the model takes it.

    input_ids: int32 [1, L]. visual: int32 [V], the positions of the visual tokens in 0..L-1, image
    after image. pixels: one per image. tokens: the visual tokens [N, D] of each image where they
    are known already; the pixels are not looked at then. jpeg_draft: whether images were read so.
    """

    input_ids: np.ndarray
    visual: np.ndarray
    pixels: list[Pixels]
    tokens: "Sequence[mx.array] | None" = None
    jpeg_draft: bool = False


class Processor(ABC):
    """Prompts of one family. Subclasses say what their family does; see the module's first lines.

    stop_tokens: tokens that end an answer besides the configuration's, where the vocabulary has
    them. jpeg_draft: large JPEGs are decoded at a part of their size, if that is still enough:
    faster, but not the same pixels, and what an image's size is taken for is then that part.
    token_methods: by which visual tokens may become fewer in the family; `methods` has a model's.
    chooses_side: whether a picture's size
    may be left to it.
    """

    stop_tokens: tuple[str, ...] = ()
    token_methods: frozenset[str] = OF_TOKENS
    chooses_side = False
    jpeg_draft = False
    offline = False  # whether pictures behind http(s) addresses are refused

    def __init__(
        self, config: Any, tokenizer: Tokenizer, asked: Preprocessing = AS_PUBLISHED
    ) -> None:
        """asked: what is to be done to pictures in the place of what the checkpoint says."""
        self.config = config.adapted(asked)
        self.budget = asked.budget
        self.tokenizer = tokenizer
        named = (tokenizer.token_id(token) for token in self.stop_tokens)
        extra = {token for token in named if token is not None}
        self.eos_ids: frozenset[int] = tokenizer.eos_ids | {*config.eos_token_ids} | extra

    @cached_property
    def rows(self) -> int:
        """How many of the vocabulary's rows an answer's tokens are from; those beyond are there to
        round their number up, and no token of an answer may be one."""
        rows = self.config.text.vocab_size
        ends = (id for id in self.eos_ids if id < rows)
        return max(self.tokenizer.rows(rows), 1 + max(ends, default=0))

    def __call__(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[Any] = (),
        *,
        raw: bool = False,
        budget: TokenBudget | None = None,
    ) -> Inputs:
        """Make a prompt ready for the model.

        prompt: a question, or chat messages with pictures in them or places for `images`; see
        `messages.normalize`. With `raw`, the text as it stands: special tokens in it count, and
        one <image> stands for each picture.
        images: paths, URLs, bytes, Pillow images or uint8 arrays, or the pixels of an earlier
        prompt; a Video where the family knows them, which has a {"type": "video"} part in a chat
        and an <image> in a raw text.
        budget: how many visual tokens each picture has here, whatever the processor's says.
        Raises UsageError for an unreadable image, a malformed message, or as many images as the
        text has no places for.
        """
        return result(self.steps(prompt, images, raw=raw, budget=budget))

    def steps(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[Any] = (),
        *,
        raw: bool = False,
        budget: TokenBudget | None = None,
        seen: Callable[[Pixels], None] | None = None,
        opening: Callable[[list[int]], None] | None = None,
    ) -> Steps[Inputs]:
        """What a call does, in its steps: of each image, then of the text.

        seen: called with each image's pixels before the next image is read. opening: called with
        the ids before the first image, where there are some, before that is read.
        """
        text, images = self._text(prompt, images, raw)
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates: bytes of the command line or JSON escapes
            raise UsageError("the prompt is not valid Unicode text; write it in UTF-8") from None
        segments = self.split(text, len(images))
        if opening is not None and (first := self.opening(segments)):
            self._check_ids(first, np.zeros((0,), np.int32))
            opening(first)
        preprocess, pixels = self.preprocessor(len(images)), []
        for source in images:
            read = yield from self.read(source, preprocess)
            pixels.append(self.within(read, budget or self.budget))
            if seen is not None:
                seen(pixels[-1])
        ids, visual = self.expand(segments, pixels)
        if not ids:
            raise UsageError("the prompt is empty")
        self._check_ids(ids, visual)
        yield "tokenise", ids
        return Inputs(
            np.array([ids], np.int32),
            np.asarray(visual, np.int32),
            pixels,
            jpeg_draft=self.jpeg_draft and bool(images),
        )

    def _check_ids(self, ids: Sequence[int], visual: np.ndarray) -> None:
        """Raises UsageError for a token that the embedding has no row for: MLX would read other
        memory. Placeholders of visual tokens are never looked up."""
        text = np.delete(np.asarray(ids), visual)
        rows = self.config.text.vocab_size
        if len(text) and not 0 <= text.min() <= text.max() < rows:
            wrong = int(text.max() if text.max() >= rows else text.min())
            word = self.tokenizer.backend.id_to_token(wrong) if wrong >= 0 else None
            raise UsageError(
                f"the prompt has token {wrong} ({word}), and the model knows {rows} tokens: its "
                "tokenizer has some that it was not trained with"
            )

    def read(self, source: Any, preprocess: Preprocess) -> Steps[Pixels]:
        """One of a prompt's images, from its source to pixels."""
        if isinstance(source, Pixels):
            return source
        if isinstance(source, Video):
            raise UsageError(
                "this model does not take videos: give one of their frames as an image"
            )
        if self.offline:
            refuse_remote(source)
        image = open_picture(source, self.draft_side() if self.jpeg_draft else None)
        yield "image decode", image
        pixels = preprocess(image)
        begin(pixels.data)
        yield "preprocess", pixels.data
        return pixels

    def _text(
        self, prompt: str | Sequence[Message], images: Sequence[Any], raw: bool
    ) -> tuple[str, Sequence[Any]]:
        """The prompt's text with a marker per picture, and the pictures in order."""
        if raw:
            if not isinstance(prompt, str):
                raise UsageError("a raw prompt is a text, not a list of messages")
            self._check_length([prompt])
            return prompt.replace(GUARD, GUARD * 2), images
        messages, images = normalize(prompt, images)
        parts = [part for message in messages for part in message["content"]]
        self._check_length([part["text"] for part in parts if part["type"] == "text"])
        return self.render([self._guarded(message) for message in messages]), images

    def _check_length(self, texts: Sequence[str]) -> None:
        """Raises UsageError for what no context could hold, before it is taken to pieces."""
        length, context = sum(map(len, texts)), self.config.context
        if length > context * CHARACTERS_PER_TOKEN:
            raise UsageError(
                f"the prompt is {length:,} characters long, more than a context of {context:,} "
                "tokens can hold: shorten it"
            )

    def _guarded(self, message: Message) -> Message:
        parts = [
            {**part, "text": self.tokenizer.guard(part["text"], MARKER)}
            if part["type"] == "text"
            else part
            for part in message["content"]
        ]
        return {**message, "content": parts}

    def split(self, text: str, images: int) -> list[str]:
        """The text before, between and after the image markers, one more than there are images.

        Raises UsageError when there are more or fewer markers than images.
        """
        segments = split_unmarked(text, PLACES)[::2]
        if len(segments) - 1 != images:
            raise UsageError(
                f"the prompt has {count(len(segments) - 1, 'place')} for an image ({MARKER}), but "
                f"{count(images, 'image')} {'was' if images == 1 else 'were'} given"
            )
        return segments

    def preprocessor(self, images: int) -> Callable[[Picture], Pixels]:
        """What prepares each of a prompt's images; `preprocess`, however many there are."""
        return self.preprocess

    def draft_side(self) -> int:
        """Pixels that neither side of a picture may be below before `preprocess`, which would
        have to enlarge it otherwise. Raises UsageError in a family that always needs them all."""
        raise UsageError("this model takes pictures in full: leave the JPEG draft out")

    def check_tokens(self) -> None:
        """Raises UsageError where a chat's control tokens are not in the vocabulary: they would be
        spelt out, and no answer would end."""
        for word in CONTROL.findall(self._probe()):
            if self.tokenizer.token_id(word) is None:
                raise UsageError(
                    f"the tokenizer has no {word}, which this model's chats are written with: copy "
                    "the tokenizer's files from the original model"
                )

    def _probe(self) -> str:
        """A chat as this family writes it, or one question, where it knows nothing else."""
        content = [{"type": "text", "text": "x"}]
        turns: list[Message] = [
            {"role": role, "content": content} for role in ("user", "assistant", "user")
        ]
        for messages in (turns, turns[:1]):
            try:
                return self.render(messages)
            except UsageError:  # told when somebody asks for it
                continue
        return ""

    def by_template(self, messages: Sequence[Message]) -> str:
        """The prompt that the folder's own chat template writes, for fine-tuned models."""
        template = self.tokenizer.chat_template or ""
        parts = takes_parts(template)
        shown = [
            {**message, "content": _as_images(message["content"]) if parts
             else join_parts(message["content"])}
            for message in messages
        ]  # fmt: skip
        return render_chat_template(
            template, shown, add_generation_prompt=True, **self.tokenizer.named
        )

    @abstractmethod
    def preprocess(self, image: Picture) -> Pixels:
        """An upright RGB image -> what `Model.encode_image` takes."""

    @abstractmethod
    def render(self, messages: list[Message]) -> str:
        """Messages -> the prompt's text up to where the answer begins, with <image> for images.

        Contents are lists of parts, and users' words are guarded: special tokens written here
        count, the same characters in a user's text do not.
        """

    def visual_tokens(self, pixels: Pixels) -> int:
        """How many visual tokens the language model sees of an image."""
        if pixels.reduction is not None:
            return pixels.reduction.total
        return sum(block.total for block in self.blocks(pixels))

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        """How all of an image's visual tokens lie. Raises UsageError in a family where none of them
        can be left out."""
        raise UsageError("this model's visual tokens cannot be made fewer: leave the number out")

    @classmethod
    def methods(cls, config: Any) -> frozenset[str]:
        """By which the visual tokens of the model with this config may become fewer."""
        return cls.token_methods

    def within(self, pixels: Pixels, budget: TokenBudget | None) -> Pixels:
        """Pixels whose visual tokens are as few as a budget says, or all of them.

        Raises UsageError for a budget that cannot be.
        """
        if budget is None:
            return pixels if pixels.reduction is None else replace(pixels, reduction=None)
        check_method(budget.method, self.methods(self.config))
        blocks = self.blocks(pixels)
        if budget.method not in ATTENDED:  # which compare no pairs, and score whole tiles
            blocks = tuple(band for block in blocks for band in block.bands())
        return replace(pixels, reduction=planned(budget, blocks))

    def opening(self, segments: list[str]) -> list[int]:
        """The ids before the first image as far as no image decides on them; `expand` has the last
        word."""
        return self.expand(segments[:1], [])[0] if len(segments) > 1 else []

    @abstractmethod
    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        """The text around the images -> token ids with placeholders, and the visual positions.

        Segments are encoded with `special=True`.
        """


def _as_images(content: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{"type": "image"} if part["type"] == "video" else part for part in content]


def join_parts(content: Sequence[Mapping[str, Any]]) -> str:
    """A message's parts as one text, with a line for each picture before the words, as the
    originals write it; further on a picture has one where no space sets it off.

    image, " What?" -> "<image>\\n What?"; "Is ", image, " red?" -> "Is <image> red?".
    """
    pictures = next((i for i, part in enumerate(content) if part["type"] == "text"), len(content))
    lines, text, after_image = [MARKER] * pictures, "", False
    for part in content[pictures:]:
        is_image = part["type"] != "text"
        piece = MARKER if is_image else part["text"]
        if not piece:
            continue
        touching = text and not text[-1].isspace() and not piece[0].isspace()
        text += "\n" + piece if touching and (is_image or after_image) else piece
        after_image = is_image
    return "\n".join([*lines, text] if content[pictures:] else lines)


def chatml(messages: Sequence[Message], system: str) -> str:
    """Qwen's chat format: each turn between <|im_start|> and <|im_end|>, and no BOS.

    `system` goes first where the messages have no system turn of their own.
    """
    if messages[0]["role"] != "system":
        content = [{"type": "text", "text": system}]
        messages = [{"role": "system", "content": content}, *messages]
    turns = [
        f"<|im_start|>{message['role']}\n{join_parts(message['content'])}<|im_end|>\n"
        for message in messages
    ]
    return "".join(turns) + "<|im_start|>assistant\n"


def expand_around_images(
    segments: Sequence[str], counts: Sequence[int], tokenizer: Tokenizer, placeholder: int
) -> tuple[list[int], np.ndarray]:
    """Tokenise each segment by itself, with counts[i] placeholders between segments i and i + 1.

    As LLaVA does. Segments "a", "b" with one image of 2 tokens: [a, P, P, b] and positions [1, 2].
    """
    ids = tokenizer.encode(segments[0], special=True)
    visual: list[int] = []
    for places, segment in zip(counts, segments[1:], strict=True):
        visual += range(len(ids), len(ids) + places)
        ids += [placeholder] * places
        ids += tokenizer.encode(segment, special=True)
    return ids, np.array(visual, np.int32)
