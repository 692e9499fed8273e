"""A question or chat messages, and images -> token ids with image placeholders already expanded.

Here is the order of the work; how an image looks to the model, how a chat is written and how
placeholders are placed belong to the family (LLaVA tokenises around each image, Idefics3 one
whole text, Fuyu puts the image before BOS).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..picture.image import Pixels, open_image
from ..picture.preprocessing import AS_PUBLISHED, Preprocessing
from ..picture.video import Video
from ..timings import Steps, result
from .guard import GUARD, split_unmarked, unmarked
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import mlx.core as mx
    from PIL.Image import Image

MARKER = "<image>"
PLACES = unmarked([MARKER])
ROLES = ("system", "user", "assistant")

# {"role": ..., "content": text or parts}, a part being {"type": "text", "text": ...},
# {"type": "image"} or {"type": "video"}.
Message = Mapping[str, Any]
Preprocess = Callable[["Image"], Pixels]


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
    """

    stop_tokens: tuple[str, ...] = ()
    jpeg_draft = False

    def __init__(
        self, config: Any, tokenizer: Tokenizer, asked: Preprocessing = AS_PUBLISHED
    ) -> None:
        """asked: what is to be done to pictures in the place of what the checkpoint says."""
        self.config = config.adapted(asked)
        self.tokenizer = tokenizer
        named = (tokenizer.token_id(token) for token in self.stop_tokens)
        extra = {token for token in named if token is not None}
        self.eos_ids: frozenset[int] = tokenizer.eos_ids | {*config.eos_token_ids} | extra

    def __call__(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[Any] = (),
        *,
        raw: bool = False,
    ) -> Inputs:
        """Make a prompt ready for the model.

        prompt: a question, or chat messages whose content has one {"type": "image"} part per
        image (without any, the images go before the first user's words). With `raw`, the text as
        it stands: special tokens in it count, and one <image> stands for each picture.
        images: paths, URLs, bytes, Pillow images or uint8 arrays, or the pixels of an earlier
        prompt; a Video where the family knows them, which has a {"type": "video"} part in a chat
        and an <image> in a raw text.
        Raises UsageError for an unreadable image, a malformed message, or as many images as the
        text has no places for.
        """
        return result(self.steps(prompt, images, raw=raw))

    def steps(
        self, prompt: str | Sequence[Message], images: Sequence[Any] = (), *, raw: bool = False
    ) -> Steps[Inputs]:
        """What a call does, in its steps: of each image, then of the text."""
        kinds = [item.kind if isinstance(item, Video | Pixels) else "image" for item in images]
        text = self._text(prompt, kinds, raw)
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates: bytes of the command line or JSON escapes
            raise UsageError("the prompt is not valid Unicode text; write it in UTF-8") from None
        segments = self.split(text, len(images))
        preprocess, pixels = self.preprocessor(len(images)), []
        for source in images:
            pixels.append((yield from self.read(source, preprocess)))
        ids, visual = self.expand(segments, pixels)
        if not ids:
            raise UsageError("the prompt is empty")
        yield "tokenise", ids
        return Inputs(
            np.array([ids], np.int32),
            np.asarray(visual, np.int32),
            pixels,
            jpeg_draft=self.jpeg_draft and bool(images),
        )

    def read(self, source: Any, preprocess: Preprocess) -> Steps[Pixels]:
        """One of a prompt's images, from its source to pixels."""
        if isinstance(source, Pixels):
            return source
        if isinstance(source, Video):
            raise UsageError(
                "this model does not take videos: give one of their frames as an image"
            )
        image = open_image(source, self.draft_side() if self.jpeg_draft else None)
        yield "image decode", image
        pixels = preprocess(image)
        yield "preprocess", pixels
        return pixels

    def _text(self, prompt: str | Sequence[Message], kinds: Sequence[str], raw: bool) -> str:
        if raw:
            if not isinstance(prompt, str):
                raise UsageError("a raw prompt is a text, not a list of messages")
            return prompt.replace(GUARD, GUARD * 2)
        messages = normalize(prompt, kinds)
        return self.render([self._guarded(message) for message in messages])

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
                f"the prompt has {_count(len(segments) - 1, 'place')} for an image ({MARKER}), but "
                f"{_count(images, 'image')} {'was' if images == 1 else 'were'} given"
            )
        return segments

    def preprocessor(self, images: int) -> Callable[["Image"], Pixels]:
        """What prepares each of a prompt's images; `preprocess`, however many there are."""
        return self.preprocess

    def draft_side(self) -> int:
        """Pixels that neither side of a picture may be below before `preprocess`, which would
        have to enlarge it otherwise. Raises UsageError in a family that always needs them all."""
        raise UsageError("this model takes pictures in full: leave the JPEG draft out")

    @abstractmethod
    def preprocess(self, image: "Image") -> Pixels:
        """An upright RGB image -> what `Model.encode_image` takes."""

    @abstractmethod
    def render(self, messages: list[Message]) -> str:
        """Messages -> the prompt's text up to where the answer begins, with <image> for images.

        Contents are lists of parts, and users' words are guarded: special tokens written here
        count, the same characters in a user's text do not.
        """

    @abstractmethod
    def visual_tokens(self, pixels: Pixels) -> int:
        """How many visual tokens the model makes of an image."""

    @abstractmethod
    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        """The text around the images -> token ids with placeholders, and the visual positions.

        Segments are encoded with `special=True`.
        """


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def normalize(prompt: str | Sequence[Message], kinds: Sequence[str]) -> list[Message]:
    """Messages whose contents are lists of parts; images without a place go before the first
    user's words. kinds: "image" or "video" for each. Raises UsageError for what is not a chat."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple) or not prompt:
        raise UsageError("the prompt must be a text or a list of messages, not empty")
    messages = [_normalize_message(message) for message in prompt]
    if messages[-1]["role"] != "user":
        raise UsageError("the last message must be the user's: there is nothing to answer")
    if all(part["type"] == "text" for message in messages for part in message["content"]):
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        parts = [{"type": kind} for kind in kinds] + messages[first]["content"]
        messages[first] = {**messages[first], "content": parts}
    asked = messages[-1]["content"]
    if not any(part["type"] != "text" or part["text"].strip() for part in asked):
        raise UsageError("the question is empty: ask something")
    return messages


def _normalize_message(message: Any) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise UsageError("a message must be an object with 'role' and 'content'")
    if message["role"] not in ROLES:
        raise UsageError(f"role {message['role']!r} is not one of {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise UsageError("a message's content must be a text or a list of parts")
    for part in content:
        _check_part(part)
        if part["type"] != "text" and message["role"] != "user":
            raise UsageError(
                f"{part['type']}s belong to the user's messages, not the {message['role']}'s"
            )
    return {**message, "content": list(content)}


def _check_part(part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "video"):
        raise UsageError(f"content part of type {kind!r} is not known: use 'text' or 'image'")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise UsageError("a content part of type 'text' must have a 'text'")


def join_parts(content: Sequence[Mapping[str, Any]]) -> str:
    """A message's parts as one text; an image has a line of its own where no space sets it off.

    image, "What is it?" -> "<image>\\nWhat is it?"; "Is ", image, " red?" -> "Is <image> red?".
    """
    text, after_image = "", False
    for part in content:
        is_image = part["type"] != "text"
        piece = MARKER if is_image else part["text"]
        if not piece:
            continue
        touching = text and not text[-1].isspace() and not piece[0].isspace()
        text += "\n" + piece if touching and (is_image or after_image) else piece
        after_image = is_image
    return text


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
    for count, segment in zip(counts, segments[1:], strict=True):
        visual += range(len(ids), len(ids) + count)
        ids += [placeholder] * count
        ids += tokenizer.encode(segment, special=True)
    return ids, np.array(visual, np.int32)
