"""A model, a picture and a question -> timed runs: staged and plain ones in turn.

A staged run waits for the device after every stage; a plain one is what `generate` does.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mlx_vlm_edge.generation.loop import GenerationResult, stream_generate
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.text.prompt import Processor
from mlx_vlm_edge.timings import Clock

from .figures import PlainRun, Runs, StagedRun

STAGED_TOKENS = 2  # so that the next token is under way before the first is out, as in a plain run

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What is asked: the picture as the bytes of a file, the text, how many tokens are decoded."""

    image: bytes
    text: str
    max_tokens: int


def measure(
    model: VisionLanguageModel,
    processor: Processor,
    question: Question,
    runs: int,
    *,
    clock: Clock = time.perf_counter,
    progress: Progress = lambda text: None,
) -> Runs:
    """`runs` staged and as many plain runs, in turn, after one warm-up of each.

    An end token does not end a run: exactly `max_tokens` are decoded.
    """
    staged, plain = [], []
    ends, processor.eos_ids = processor.eos_ids, frozenset()
    try:
        for index in range(runs + 1):
            progress("warm-up" if index == 0 else f"run {index} of {runs}")
            staged.append(staged_run(model, processor, question, clock))
            plain.append(plain_run(model, processor, question, clock))
    finally:
        processor.eos_ids = ends  # the caller's processor goes on answering
    return Runs(staged, plain)


def staged_run(
    model: VisionLanguageModel, processor: Processor, question: Question, clock: Clock
) -> StagedRun:
    """One run with stage boundaries, up to the first token."""
    first = _answer(model, processor, question, clock, verbose=True)[0]
    return StagedRun(first.stages or {}, first.ttft_e2e)


def plain_run(
    model: VisionLanguageModel, processor: Processor, question: Question, clock: Clock
) -> PlainRun:
    """One run without stage boundaries, to the end of the answer."""
    pieces = _answer(model, processor, question, clock, verbose=False)
    tokens = [piece for piece in pieces if piece.token is not None]
    last = tokens[-1]
    return PlainRun(
        ttft_e2e=last.ttft_e2e,
        decode_tps=last.generation_tps,
        prompt_tokens=last.prompt_tokens,
        visual_tokens=last.visual_tokens,
        generated=last.generation_tokens,
        peak_memory=pieces[-1].peak_memory,
    )


def _answer(
    model: VisionLanguageModel,
    processor: Processor,
    question: Question,
    clock: Clock,
    verbose: bool,
) -> list[GenerationResult]:
    tokens = STAGED_TOKENS if verbose else question.max_tokens
    return list(
        stream_generate(
            model, processor, question.text, [question.image],
            verbose=verbose, clock=clock, max_tokens=tokens,
            prefix_cache=False,  # every run is one of a first prompt
        )
    )  # fmt: skip
