"""An answer's tokens, chosen one after the other: logits in, with all that depends on the ones
chosen before (penalties, a grammar), and what they were likely to be."""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from .sampling import Sampling, make_sampler, penalties

if TYPE_CHECKING:
    from .grammar import Matcher


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability by the model, before any setting, and the likeliest ones' (id,
    log-probability), likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenSampler:
    """Logits [1, V] -> token int[1], for one answer.

    prompt: its token ids, int[N]. logprobs: how many of the likeliest tokens to tell of with each
    token; None tells nothing. matcher: what the answer must match; it needs each token on the host
    before the next can be chosen. rows: how many of the vocabulary's rows may be chosen, the first
    ones; None for all.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: mx.array,
        logprobs: int | None = None,
        matcher: "Matcher | None" = None,
        rows: int | None = None,
    ) -> None:
        self._draw, self._sampling, self._matcher = make_sampler(sampling), sampling, matcher
        self._recent = prompt[-sampling.repetition_context_size :]
        self._counts: mx.array | None = None
        self._last: mx.array | None = None
        self._rows = rows
        self._count, self._told = logprobs, deque[tuple[mx.array, mx.array, mx.array]]()

    def __call__(self, logits: mx.array) -> mx.array:
        chosen_from = self._tokens(self._penalized(logits))
        if self._matcher is not None:
            if self._last is not None:
                self._matcher.take(cast(int, self._last.item()))
            chosen_from = self._matcher.allow(chosen_from)
        token = self._draw(chosen_from)
        self._last = token
        if self._count is not None:
            self._tell(logits, token, self._count)
        return token

    def _tokens(self, logits: mx.array) -> mx.array:
        """Logits without rows that are no tokens, at their end."""
        padded = self._rows is not None and self._rows < logits.shape[-1]
        return logits[..., : self._rows] if padded else logits

    def _penalized(self, logits: mx.array) -> mx.array:
        sampling = self._sampling
        asked = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        if asked == (1, 0, 0):
            return logits
        if self._counts is None:
            self._counts = mx.zeros(logits.shape[-1])
        if self._last is not None:
            self._recent = mx.concatenate([self._recent, self._last])
            self._counts = self._counts.at[self._last].add(1)
        self._recent = self._recent[-sampling.repetition_context_size :]
        return penalties(*asked)(logits, self._recent, self._counts)

    def _tell(self, logits: mx.array, token: mx.array, count: int) -> None:
        """Keep a token's log-probability and the likeliest ones', which nothing waits for yet."""
        logits = logits[0].astype(mx.float32)
        every = logits - mx.logsumexp(logits)
        top = mx.argsort(-self._tokens(every))[:count]
        told = every[token], top, every[top]
        mx.async_eval(told)  # another thread may take the token
        self._told.append(told)

    def told(self) -> TokenLogprobs | None:
        """Of the token that is handed out next; None where none was asked for."""
        if not self._told:
            return None
        own, ids, values = self._told.popleft()
        top = zip(cast(list[int], ids.tolist()), cast(list[float], values.tolist()), strict=True)
        return TokenLogprobs(cast(float, own.item()), tuple(top))
