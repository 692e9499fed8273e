"""A family's prompt, as an app that has only a tokenizer can write it: one picture, one question.

Our own processor writes it; what is here was held against that on questions that are awkward to
tokenise, and where the two differ there is none.
"""

from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_edge.text.messages import normalize
from mlx_vlm_edge.text.prompt import MARKER, Processor

QUESTION = "\ue000"  # private use: no template has it
Ids = tuple[int, ...]
SAMPLES = ("What is it?", "two\n\nlines, \u00e9 and 1234. ", ".", "1")


def prompt_entry(processor: Processor | None) -> dict[str, Any] | None:
    """ids of a prompt = before_image, one placeholder for each visual token, after_image, and the
    text before_question + question + after_question, whose special tokens count.

    A question does not begin with white space, which some families write otherwise.
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
