"""A family's prompts, as an app that has only a tokenizer can write them.

Our own processor writes them; what is here was held against that on questions that are awkward to
tokenise, and where the two differ there is none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text.messages import Message, normalize
from mlx_vlm_edge.text.prompt import MARKER, Processor

QUESTION, ANSWER = "\ue000", "\ue001"  # private use: no template has them
Ids = tuple[int, ...]
SAMPLES = ("What is it?", "two\n\nlines, \u00e9 and 1234. ", ".", "1")


def prompt_entry(processor: Processor | None) -> dict[str, Any] | None:
    """ids of a prompt = before_image, one placeholder for each visual token, after_image, and the
    text before_question + question + after_question, whose special tokens count.

    A question does not begin with white space, which some families write otherwise. chat: as
    `_chat` has it, of several turns and pictures; None where turns are not text one after another.
    special_tokens: what a question must not have in it, since it would be read as the chat's own.
    None without a tokenizer, and for families that write a picture otherwise.
    """
    if processor is None:
        return None
    rendered = processor.render(normalize(QUESTION, [b""])[0])
    start, question, after = rendered.partition(QUESTION)
    pieces = start.split(MARKER)
    if not question or len(pieces) != 2:
        return None
    around = {_around(processor, sample, pieces[1] + sample + after) for sample in SAMPLES}
    if len(around) != 1 or (same := around.pop()) is None:
        return None
    return {
        "before_image": list(same[0]),
        "after_image": list(same[1]),
        "before_question": pieces[1],
        "after_question": after,
        "special_tokens": sorted(processor.tokenizer.special),
        "chat": _chat(processor),
    }


def _around(processor: Processor, question: str, text: str) -> tuple[Ids, Ids] | None:
    """Ids before the picture, and between it and `text`; None where that is not how it is."""
    inputs = processor(question, images=[Image.new("RGB", (64, 64))])
    ids, visual = inputs.input_ids[0].tolist(), inputs.visual
    tail = processor.tokenizer.encode(text, special=True)
    first, last = int(visual[0]), int(visual[-1]) + 1
    if (np.diff(visual) != 1).any() or not tail or ids[last:][-len(tail) :] != tail:
        return None
    return tuple(ids[:first]), tuple(ids[last : len(ids) - len(tail)])


def _turn(role: str, words: str, pictures: int = 0) -> Message:
    parts = [{"type": "image", "image": Image.new("RGB", (64, 64))} for _ in range(pictures)]
    return {"role": role, "content": [*parts, {"type": "text", "text": words}]}


def _chat(processor: Processor) -> dict[str, Any] | None:
    """Text of a chat = start, or the two of system around an app's own instructions; then for each
    turn MARKER + after_picture for each picture, the question, after_question, the answer's own
    tokens without the one that ends it, and after_answer before the next turn.

    Each stretch of text between pictures and answers is tokenised by itself, special tokens
    counting; bos comes before all. None where our processor's ids are not these.
    """
    try:
        one = _rendered(processor, _turn("user", QUESTION, 1))
        start, line, after = _between(one, MARKER, QUESTION)
        again = (_turn("user", SAMPLES[0], 1), _turn("assistant", ANSWER), _turn("user", QUESTION))
        _, after_answer, _ = _between(_rendered(processor, *again), ANSWER, QUESTION)
        bos = _bos(processor, start)
        chat = {
            "bos": bos,
            "start": start,
            "system": _system(processor),
            "after_picture": line,
            "after_question": after,
            "after_answer": after_answer,
        }
        sound = all(_writes(processor, chat, n, sample) for n in (1, 2) for sample in SAMPLES)
    except (UsageError, ValueError):
        return None
    return chat if sound else None


def _rendered(processor: Processor, *messages: Message) -> str:
    return processor.render(normalize(list(messages))[0])


def _between(text: str, first: str, second: str) -> tuple[str, str, str]:
    """The text before, between and after two words. Raises ValueError where one is not there once,
    or they are the other way round."""
    before, rest = text.split(first)
    middle, after = rest.split(second)
    return before, middle, after


def _system(processor: Processor) -> list[str] | None:
    """The text around instructions of an app's own; None in families that take none."""
    try:
        turns = (_turn("system", ANSWER), _turn("user", QUESTION, 1))
        text, _, _ = _between(_rendered(processor, *turns), MARKER, QUESTION)
        before, after = text.split(ANSWER)
    except (UsageError, ValueError):
        return None
    return [before, after]


def _bos(processor: Processor, start: str) -> list[int]:
    """The ids that a prompt has before those of its text."""
    inputs = processor(SAMPLES[0], images=[Image.new("RGB", (64, 64))])
    ids, own = inputs.input_ids[0].tolist(), processor.tokenizer.encode(start, special=True)
    before = ids[: int(inputs.visual[0])]
    if before[len(before) - len(own) :] != own:
        raise ValueError("the text before a picture is not tokenised by itself")
    return before[: len(before) - len(own)]


def _writes(processor: Processor, chat: dict[str, Any], pictures: int, words: str) -> bool:
    """Whether the chat's ids are our processor's, for a first turn and for one after an answer."""
    encode, asked = processor.tokenizer.encode, words.strip()
    turns = [_turn("user", asked, pictures), _turn("assistant", "A."), _turn("user", asked, 1)]
    first, whole = _textual(processor, turns[:1]), _textual(processor, turns)
    lines = [chat["after_picture"]] * (pictures - 1)
    last = chat["after_picture"] + asked + chat["after_question"]
    own = [
        *chat["bos"],
        *(id for text in (chat["start"], *lines, last) for id in encode(text, special=True)),
    ]
    tail = [*encode(chat["after_answer"], special=True), *encode(last, special=True)]
    return first == own and whole[: len(own)] == own and whole[len(whole) - len(tail) :] == tail


def _textual(processor: Processor, messages: Sequence[Message]) -> list[int]:
    """The ids of a chat without its visual tokens."""
    inputs = processor(messages)
    ids: list[int] = np.delete(inputs.input_ids[0], inputs.visual).tolist()
    return ids
