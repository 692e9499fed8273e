"""A question whose prompt has an exact number of text tokens."""

from collections.abc import Callable
from typing import Any

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text.prompt import Processor

QUESTION = "What is in this picture?"
WORDS = (" the", " a", " x", ",", "1")  # what a question is lengthened with
TRIES = 24


def text_of(processor: Processor, image: Any, tokens: int | None) -> str:
    """A question whose prompt has exactly `tokens` text tokens, the family's own words included.

    image: as the processor takes it; one that is preprocessed already is not looked at again.
    Visual tokens come on top. Raises UsageError when no question has that many.
    """
    if tokens is None:
        return QUESTION

    def count(text: str) -> int:
        inputs = processor(text, [image])
        return int(inputs.input_ids.shape[1]) - len(inputs.visual)

    shortest = processor("x", [image])
    visual = len(shortest.visual)
    least = int(shortest.input_ids.shape[1]) - visual
    if tokens < least:
        raise UsageError(
            f"--prompt-tokens {tokens}: what this model puts around a question takes "
            f"{least} tokens with the shortest one; give {least} or more"
        )
    refuse_beyond(processor.config.context, visual, tokens)
    for word in WORDS:
        text = _lengthened(count, word, tokens)
        if text is not None:
            return text
    raise UsageError(f"--prompt-tokens {tokens}: no question was found of that length; try another")


def refuse_beyond(context: int, visual: int, text: int) -> None:
    """Raises UsageError for a prompt that is longer than the model's context."""
    if visual + text > context:
        raise UsageError(
            f"a prompt of {visual + text:,} tokens, {visual:,} of them visual, is longer than the "
            f"model's context of {context:,}"
        )


def _lengthened(count: Callable[[str], int], word: str, tokens: int) -> str | None:
    repeats = 0
    for _ in range(TRIES):
        text = "x" + word * repeats
        missing = tokens - count(text)
        if not missing:
            return text
        repeats = max(0, repeats + missing)
    return None
