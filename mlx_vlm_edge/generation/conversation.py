"""A chat with a model: several turns and pictures, each question going on where the last ended.

What earlier turns computed is taken over: pictures are decoded and encoded once, and only new text
is prefilled. Turns may be undone, edited and branched; the oldest leave when the context is full.
"""

import base64
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import whole_file
from ..errors import UsageError
from ..models.base import VisionLanguageModel
from ..paths import expand
from ..picture.check import Fetched
from ..picture.image import Pixels
from ..picture.video import Video
from ..text.messages import kind_of
from ..text.prompt import Inputs, Message, Preprocess, Processor
from ..timings import Timer, Watch
from .answer import GenerationResult
from .loop import Options, as_list, budget, stream_inputs
from .prefix import PrefixCache

FORMAT = 1  # of a saved conversation
RESERVE = 4  # at least a quarter of the context is left for the answer, where it asks for as much


@dataclass(frozen=True, eq=False)
class Turn:
    """One message. images: as they were handed in, videos among them; pixels: what `preprocess`
    made of them, which may depend on how many pictures a prompt has; none where it is None, of
    turns that were not asked about yet or were left out."""

    role: str
    text: str
    images: tuple[Any, ...] = ()
    pixels: tuple[Pixels, ...] = field(default=(), repr=False)
    preprocess: Preprocess | None = field(default=None, repr=False)

    def message(self) -> Message:
        parts = [{"type": kind_of(image)} for image in self.images]
        return {"role": self.role, "content": [*parts, {"type": "text", "text": self.text}]}

    def sources(self, preprocess: Preprocess) -> Sequence[Any]:
        """What to read the pictures from: their pixels where the same was done to them."""
        return self.pixels if self.preprocess == preprocess else self.images

    def unread(self) -> "Turn":
        """The same without pixels: they take megabytes, and can be read again."""
        return self if self.preprocess is None else replace(self, pixels=(), preprocess=None)


class Conversation:
    """Questions and answers in order.

    chat = Conversation(model, processor)
    chat.ask("What is this?", images=["photo.jpg"])
    chat.ask("What colour is it?")

    system: instructions before the first turn; None leaves the model's own. prefix_cache: shared
    with others, or one of its own. options: the fields of Options, for every answer. turns may be
    read, and changed by `undo`, `rewind`, `forget` and `clear`; `dropped` says how many of them the
    last question left out, the oldest first, because the context had no room for them. Those stay,
    with their images as they were handed in, for `undo` and `save`: a conversation that has no end,
    as with a camera, calls `forget` after each question.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        *,
        system: str | None = None,
        prefix_cache: PrefixCache | None = None,
        **options: Any,
    ) -> None:
        self.model, self.processor = model, processor
        self.system = system
        self.prefix_cache = PrefixCache() if prefix_cache is None else prefix_cache
        self.options = Options(**options)
        self.turns: list[Turn] = []
        self.dropped = 0
        self._left_out = 0  # by the last answer, whatever was undone since

    def ask(self, text: str, images: Any = None, **options: Any) -> str:
        """The answer to one more question. Raises UsageError as `stream` does."""
        return "".join(piece.text for piece in self.stream(text, images, **options))

    def stream(
        self,
        text: str,
        images: Any = None,
        *,
        verbose: bool = False,
        progress: Watch | None = None,
        **options: Any,
    ) -> Iterator[GenerationResult]:
        """The answer to one more question, piece by piece. An answer that is broken off stays
        as far as it came; a question that nothing was said to is forgotten.

        images: of this question, a path, URL, bytes, Pillow image or array, or a list of them.
        progress: is told of every step (generation/progress.py).
        Raises UsageError for a bad picture or option, and for a question that is too long.
        """
        chosen = replace(self.options, **options)
        timer, started = Timer(verbose, progress=progress), time.perf_counter()
        question = Turn("user", text, tuple(as_list(images)))
        inputs, asked, dropped = self._fitting([*self.turns, question], chosen, timer)
        pieces = stream_inputs(
            self.model, self.processor, inputs, chosen, timer, started, self.prefix_cache
        )
        return self._followed(pieces, asked, dropped)

    def _followed(
        self, pieces: Iterator[GenerationResult], asked: list[Turn], dropped: int
    ) -> Iterator[GenerationResult]:
        said, whole = "", False
        try:
            for piece in pieces:
                said, whole = said + piece.text, piece.finish_reason is not None
                yield piece
        finally:
            if said or whole:
                self.turns = [*asked, Turn("assistant", said)]
                self.dropped = self._left_out = dropped

    def _fitting(
        self, turns: list[Turn], options: Options, timer: Timer
    ) -> tuple[Inputs, list[Turn], int]:
        """The prompt of the last turns that the context has room for, all turns with their pixels,
        and how many were left out.

        When they no longer fit, so many leave that half of the room is free: dropping a turn with
        every question would have the rest prefilled again each time. Those that were left out
        before stay so where their pictures can no longer be read.
        """
        context = self.model.config.context
        room = context - min(options.max_tokens, context // RESERVE)
        first = self._first(turns, options, timer, room)
        enough = room if first == self.dropped else room // 2
        for start in range(first, len(turns), 2):
            try:
                inputs = self._prompt(turns, start, options, timer)
            except UsageError:
                if start < min(self._left_out, len(turns) - 2):
                    continue
                raise
            if inputs.input_ids.shape[1] <= enough:
                break
            enough = room // 2
        budget(self.model, inputs, options)
        turns[:start] = [turn.unread() for turn in turns[:start]]
        return inputs, turns, start

    def _first(self, turns: list[Turn], options: Options, timer: Timer, room: int) -> int:
        """Where to begin. Pictures that are not read, of turns that were loaded or left out, are
        read from the newest back, and no more than there is room for: there may be thousands."""
        unread = [
            index for index, turn in enumerate(turns[:-1])
            if index >= self.dropped and turn.images and turn.preprocess is None
        ]  # fmt: skip
        if not unread:
            return self.dropped
        first = latest = unread[-1] // 2 * 2 + 2
        for start in range(latest, self.dropped - 1, -2):
            try:
                size = self._prompt(turns, start, options, timer).input_ids.shape[1]
            except UsageError:
                if start < self._left_out:
                    break
                raise
            if size > room:
                break
            if size <= room // 2 or start == self.dropped:
                first = start
        return first

    def _prompt(self, turns: list[Turn], start: int, options: Options, timer: Timer) -> Inputs:
        """The prompt of the turns from one on, which have their pixels from then on."""
        asked = turns[start:]
        preprocess = self.processor.preprocessor(sum(len(turn.images) for turn in asked))
        sources = [source for turn in asked for source in turn.sources(preprocess)]
        steps = self.processor.steps(self._messages(asked), sources, budget=options.budget)
        inputs = timer.run(steps)
        turns[start:] = _with_pixels(asked, inputs.pixels, preprocess)
        return inputs

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        system = [] if self.system is None else [Turn("system", self.system).message()]
        return [*system, *(turn.message() for turn in turns)]

    def undo(self) -> bool:
        """Forget the last question and its answer; whether there was one."""
        return self.rewind(len(self.turns) - 2)

    def rewind(self, length: int) -> bool:
        """Go back to the first `length` turns, questions and answers counted; whether that changed
        anything. What they computed stays in the prefix cache, so going on from there is quick."""
        before = len(self.turns)
        del self.turns[max(length, 0) :]
        if len(self.turns) == before:
            return False
        self.dropped = 0  # earlier ones may have room again
        return True

    def forget(self, length: int | None = None) -> None:
        """Forget the oldest `length` turns for good, images included; without a number those that
        the last question left out, which changes no answer. A question goes with its answer: of an
        odd number one less."""
        length = self.dropped if length is None else min(max(length, 0), len(self.turns))
        length -= length % 2
        del self.turns[:length]
        self.dropped = max(0, self.dropped - length)
        self._left_out = max(0, self._left_out - length)

    def branch(self) -> "Conversation":
        """Another conversation that goes on from here, with the same prefix cache."""
        other = Conversation(
            self.model, self.processor, system=self.system, prefix_cache=self.prefix_cache
        )
        other.options, other.turns = self.options, list(self.turns)
        other.dropped, other._left_out = self.dropped, self._left_out
        return other

    def clear(self) -> None:
        """Forget all turns and pictures; the system prompt stays."""
        self.turns, self.dropped, self._left_out = [], 0, 0
        self.prefix_cache.clear()

    def save(self, path: str | Path) -> None:
        """Write the conversation to a JSON file; pictures that are no paths or URLs go in whole.

        A new file is its owner's alone to read. Raises UsageError when it cannot be written.
        """
        turns = [
            {"role": turn.role, "text": turn.text, "images": [_saved(i) for i in turn.images]}
            for turn in self.turns
        ]
        content = {"format": FORMAT, "system": self.system, "turns": turns}
        text = json.dumps(content, ensure_ascii=False, indent=1)
        encoded = text.encode(errors="backslashreplace")  # odd file names
        try:
            whole_file.write(expand(path), encoded, mode=0o600)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None

    def load(self, path: str | Path) -> None:
        """Take over a saved conversation. Raises UsageError, and changes nothing, for a damaged
        file."""
        try:
            content = json.loads(expand(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError("another version wrote it")
            system, turns = content["system"], [_turn(entry) for entry in content["turns"]]
            if not (system is None or isinstance(system, str)):
                raise ValueError("system is no text")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
            raise UsageError(f"{path}: not a saved conversation ({error})") from None
        roles = [turn.role for turn in turns]
        if roles != ["user", "assistant"] * (len(turns) // 2):
            raise UsageError(f"{path}: not a saved conversation (its turns are out of order)")
        self.system, self.turns, self.dropped, self._left_out = system, turns, 0, 0


def _with_pixels(
    turns: Sequence[Turn], pixels: Sequence[Pixels], preprocess: Preprocess
) -> list[Turn]:
    """The turns with what became of their pictures, all pictures in order."""
    left = iter(pixels)
    return [
        replace(turn, pixels=tuple(next(left) for _ in turn.images), preprocess=preprocess)
        for turn in turns
    ]


def _saved(source: Any) -> str | dict[str, Any]:
    """A picture's source as text: its path or URL, or its content as a data: URL; a video's path
    and rate."""
    if isinstance(source, Video):
        return {"video": str(source.source), "fps": source.fps}
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, Fetched):
        return source.address
    if not isinstance(source, bytes | bytearray | memoryview):
        import io

        from ..picture.image import open_image

        written = io.BytesIO()
        open_image(source).save(written, "PNG")
        source = written.getvalue()
    return "data:;base64," + base64.b64encode(source).decode()


def _turn(entry: Any) -> Turn:
    role, text, images = entry["role"], entry["text"], entry.get("images", [])
    if not isinstance(text, str):
        raise ValueError("a turn is damaged")
    return Turn(role, text, tuple(map(_source, images)))


def _source(saved: Any) -> str | Video:
    """What `_saved` made text of."""
    if isinstance(saved, str):
        return saved
    path, fps = saved["video"], saved["fps"]
    if not isinstance(path, str) or not (fps is None or type(fps) in (int, float)):
        raise ValueError("a turn is damaged")
    return Video(path, fps)
