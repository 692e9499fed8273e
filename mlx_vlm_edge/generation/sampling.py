"""Logits [1, V] -> the next token; and where to stop by text. mlx-lm's semantics and names.

Everything random has an explicit key, so that a seed repeats a run whatever else uses MLX.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from ..errors import UsageError
from ..kernels import compiled

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Raises UsageError for a value out of range.

    temperature: 0 is greedy. top_p: the smallest set with this probability (0 or 1: all).
    top_k: the k likeliest (0: all). min_p: at least this share of the likeliest one's probability.
    repetition_penalty: logits of the last repetition_context_size tokens are divided by it
    (multiplied, where negative); 1 is none. presence_penalty is taken from the logits of every
    token that the answer has already, frequency_penalty once for each time (as OpenAI's API).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0, math.inf)
        check_number("top_p", self.top_p, 0, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, math.ulp(0.0), math.inf)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("top_k", self.top_k, 0, math.inf, whole=True)
        check_number(
            "repetition_context_size", self.repetition_context_size, 1, math.inf, whole=True
        )
        if self.seed is not None:
            check_number("seed", self.seed, 0, 2**64 - 1, whole=True)


def check_number(
    name: str, value: object, low: float, high: float = math.inf, whole: bool = False
) -> None:
    """Raises UsageError unless `value` is a finite number (with `whole`, an int) in low..high."""
    kinds = int if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if number and low <= value < math.inf and value <= high:  # type: ignore[operator]
        return
    kind = "a whole number" if whole else "a number"
    bounds = f"between {low} and {high}" if high < math.inf else f"of at least {low}"
    if low == math.ulp(0.0):
        bounds = "above 0"
    raise UsageError(f"{name} must be {kind} {bounds}, not {value!r}")


def make_sampler(sampling: Sampling) -> Sampler:
    """Logits [1, V] -> token int[1]. Greedy is a plain argmax.

    Otherwise top-p, min-p and top-k in mlx-lm's order, all on the untempered distribution, then a
    draw at the temperature.
    """
    if sampling.temperature == 0:
        return greedy
    draw = drawing(sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k)
    import random  # and with it hashlib, which greedy answers do without

    seeds = random.Random(sampling.seed)  # of the system's randomness for None

    # A key split from the last one's would be MLX's, and belong to the thread that split it.
    return lambda logits: draw(logits, mx.random.key(seeds.getrandbits(64)))


@lru_cache(maxsize=16)  # settings whose graphs are remembered, from one answer to the next
def drawing(
    temperature: float, top_p: float, min_p: float, top_k: int
) -> Callable[[mx.array, mx.array], mx.array]:
    """Logits [1, V] and a key -> a token int[1], as one graph where MLX compiles."""

    def draw(logits: mx.array, key: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        if 0 < top_p < 1:
            logits = keep_top_p(logits, top_p)
        if min_p > 0:
            logits = keep_min_p(logits, min_p)
        if top_k > 0:
            logits = keep_top_k(logits, top_k)
        return mx.random.categorical(logits * (1 / temperature), key=key)

    return compiled(draw)


@lru_cache(maxsize=16)
def penalties(
    repetition: float, presence: float, frequency: float
) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Logits [1, V], recent tokens int[N] and counts float[V] -> logits less their penalties, as
    one graph where MLX compiles."""

    def penalized(logits: mx.array, recent: mx.array, counts: mx.array) -> mx.array:
        if repetition != 1:
            logits = penalize(recent, logits, repetition)
        if presence or frequency:
            logits = penalize_counted(counts, logits, presence, frequency)
        return logits

    return compiled(penalized)


def greedy(logits: mx.array) -> mx.array:
    """The likeliest token, int[1]."""
    return mx.argmax(logits, axis=-1)


def keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    """-inf for all but the likeliest tokens that together reach `top_p`.

    Probabilities 0.5, 0.3, 0.2 at 0.6 keep the first two: the first alone has less.
    """
    ascending = mx.sort(logits, axis=-1)
    probabilities = mx.softmax(ascending, axis=-1)
    likelier = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    dropped = (likelier >= top_p).sum(axis=-1, keepdims=True)
    threshold = mx.take_along_axis(ascending, mx.minimum(dropped, logits.shape[-1] - 1), axis=-1)
    return mx.where(logits < threshold, -math.inf, logits)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """-inf for tokens less likely than `min_p` times the likeliest one."""
    threshold = logits.max(axis=-1, keepdims=True) + math.log(min_p)
    return mx.where(logits < threshold, -math.inf, logits)


def keep_top_k(logits: mx.array, top_k: int) -> mx.array:
    """-inf for all but the `top_k` likeliest tokens; all are kept when there are no more."""
    if top_k >= logits.shape[-1]:
        return logits
    rest = mx.argpartition(-logits, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logits, rest, mx.array(-math.inf, logits.dtype), axis=-1)


def penalize(tokens: mx.array, logits: mx.array, penalty: float) -> mx.array:
    """Make `tokens` less likely (arXiv 1909.05858), each once however often it is there.

    Ids outside the vocabulary, such as image placeholders, are left out.
    """
    vocabulary = logits.shape[-1]
    known = (tokens >= 0) & (tokens < vocabulary)
    seen = mx.zeros(vocabulary + 1, mx.bool_)
    seen[mx.where(known, tokens, vocabulary)] = True
    penalized = mx.where(logits < 0, logits * penalty, logits / penalty)
    return mx.where(seen[:vocabulary], penalized, logits)


def penalize_counted(
    counts: mx.array, logits: mx.array, presence: float, frequency: float
) -> mx.array:
    """Logits [1, V] less `presence` for every token that was counted, and `frequency` times its
    count, float[V]. Source: OpenAI's API reference, frequency and presence penalties."""
    return logits - (presence * (counts > 0) + frequency * counts).astype(logits.dtype)


class StopStrings:
    """Cuts streamed text at the first stop string to be completed.

    Text that may be the beginning of one is held back until that is decided, so a stop string is
    never shown, not even in part.
    """

    def __init__(self, stop: str | Sequence[str] = ()) -> None:
        self.words = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.words:
            raise UsageError("a stop string must not be empty")
        self._held = ""
        self.matched: str | None = None  # which one was completed

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    def feed(self, text: str) -> str:
        """Add text; return what is safe to show. After the stop it is always empty."""
        if self.stopped:
            return ""
        text = self._held + text
        completed = [
            (start + len(word), start, word)
            for word in self.words
            if (start := text.find(word)) >= 0
        ]
        if completed:
            _, start, self.matched = min(completed)
            self._held = ""
            return text[:start]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(word) for word in self.words), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(word.startswith(text[-size:]) for word in self.words):
                return size
        return 0

    def flush(self) -> str:
        """What is still held back, at the end of generation."""
        held, self._held = self._held, ""
        return held
