"""Token ids of one answer -> pieces of text with counts and times, up to where the answer ends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from ..text.detokenizer import Detokenizer
from ..text.prompt import Inputs, Processor
from ..timings import Timer
from .choosing import TokenLogprobs
from .sampling import StopStrings


class Drafts(Protocol):
    """How many tokens of an answer were drafted, and how many of those were right."""

    drafted: int
    accepted: int


@dataclass(frozen=True)
class GenerationResult:
    """One streamed piece, or (from `generate(full=True)`) the whole answer.

    ttft_e2e: seconds from the call, image bytes and prompt in, to the first token. Rates are
    tokens per second; prompt_tokens includes the visual tokens, and reused_tokens are those that a
    prefix cache knew. picture_sizes: (width, height) of each picture as the model saw it, or of its
    tiles. jpeg_draft: pixels may be other than those of the whole picture.
    peak_memory is in GB (1e9 bytes).
    finish_reason is None until the end, then "stop" or "length". stop_text: of `stop`,
    what ended the answer. stages: seconds per stage, when they were asked for. token and logprobs,
    where asked for, are those of a piece; the whole answer has all in `tokens`, and as many
    logprobs. drafted_tokens and accepted_tokens: drafts so far, and those that were right.
    """

    text: str
    token: int | None
    prompt_tokens: int
    visual_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft_e2e: float
    peak_memory: float
    finish_reason: str | None = None
    stages: dict[str, float] | None = None
    reused_tokens: int = 0
    jpeg_draft: bool = False
    logprobs: TokenLogprobs | tuple[TokenLogprobs, ...] | None = None
    stop_text: str | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    picture_sizes: tuple[tuple[int, int], ...] = ()
    tokens: tuple[int, ...] = ()


def whole(pieces: Sequence[GenerationResult]) -> GenerationResult:
    """All pieces of an answer as one, which has the last one's counts and times."""
    told = tuple(p.logprobs for p in pieces if isinstance(p.logprobs, TokenLogprobs))
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token=None,
        tokens=tuple(piece.token for piece in pieces if piece.token is not None),
        logprobs=told or None,
    )


class Answer:
    """One prompt's answer as it comes.

    stop: texts that end it, special tokens among them. timer: of the prompt; its clock is used.
    started: when the prompt came in, by that clock. reused: prompt tokens that a prefix cache knew.
    detokenizer: makes its text; by default special tokens have none.
    """

    def __init__(
        self,
        processor: Processor,
        inputs: Inputs,
        stop: Sequence[str],
        timer: Timer,
        started: float,
        reused: int = 0,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        tokenizer, self._stops = processor.tokenizer, StopStrings(stop)
        self._eos_ids = processor.eos_ids
        self._stop_ids = tokenizer.special_among(self._stops.words)
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer or tokenizer.detokenizer()
        self._inputs, self._reused = inputs, reused
        shapes = (pixels.data.shape for pixels in inputs.pixels)
        self._sizes = tuple((int(shape[-2]), int(shape[-3])) for shape in shapes)
        self._timer, self._started = timer, started
        self._first, self._tokens = 0.0, 0
        self._logprobs: TokenLogprobs | None = None
        self.drafts: Drafts | None = None

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> GenerationResult:
        """The piece that a token completes; its finish_reason is "stop" where the answer ends."""
        self._logprobs = logprobs
        self._tokens += 1
        if self._tokens == 1:
            self._timer.mark("first sample")
            self._first = self._timer.clock()
        if token in self._stop_ids:
            rest = self._rest()
            if not self._stops.stopped:
                self._stops.matched = self._tokenizer.decode([token], skip_special=False)
            return self._piece(rest, token, "stop")
        if token in self._eos_ids:
            return self._piece(self._rest(), token, "stop")
        text = self._stops.feed(self._detokenizer.add(token))
        return self._piece(text, token, "stop" if self._stops.stopped else None)

    def cut(self) -> GenerationResult:
        """The last piece of an answer that may have no more tokens."""
        self._logprobs = None
        rest = self._rest()  # which may have a stop string
        return self._piece(rest, None, "stop" if self._stops.stopped else "length")

    def _rest(self) -> str:
        return self._stops.feed(self._detokenizer.finish()) + self._stops.flush()

    def _piece(self, text: str, token: int | None, reason: str | None) -> GenerationResult:
        decoding = self._timer.clock() - self._first
        prompt_tokens, ttft = self._inputs.input_ids.shape[1], self._first - self._started
        return GenerationResult(
            text=text,
            token=token,
            prompt_tokens=prompt_tokens,
            visual_tokens=len(self._inputs.visual),
            prompt_tps=prompt_tokens / ttft,
            generation_tokens=self._tokens,
            generation_tps=(self._tokens - 1) / decoding if self._tokens > 1 else 0.0,
            ttft_e2e=ttft,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
            stages=dict(self._timer.seconds) if self._timer.measured else None,
            reused_tokens=self._reused,
            jpeg_draft=self._inputs.jpeg_draft,
            logprobs=self._logprobs,
            stop_text=self._stops.matched,
            picture_sizes=self._sizes,
            drafted_tokens=self.drafts.drafted if self.drafts else 0,
            accepted_tokens=self.drafts.accepted if self.drafts else 0,
        )
