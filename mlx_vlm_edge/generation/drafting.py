"""Tokens that a prompt or an answer has said before -> drafts, which one pass through the model
verifies together: documents, tables and repeated questions are answered in fewer passes.

A draft is what followed the last time that the newest tokens stood together. The pass gives each
drafted position its logits, a token is chosen from them as always (greedy or drawn, by the same
random numbers), and drafts count up to the first that was not chosen: an answer is the one that it
would be without drafts, but for ties that are within rounding. How many are worth a pass depends on
how often they were right, and on what longer passes cost on this device.
Source: Saxena, Prompt Lookup Decoding (2023).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from types import MappingProxyType
from typing import cast

import mlx.core as mx
import numpy as np

from ..language.cache import Cache, KVCache, QuantizingCaches
from ..models.base import VisionLanguageModel
from ..text.prompt import Inputs
from .choosing import TokenSampler

DRAFTS = (None, "prompt-lookup")
WORDS = 3  # tokens that must have stood together before
LENGTHS = (2, 4, 8, 16)  # drafts of one pass
ROUNDS = 3  # of which the fastest counts
WORTH = 1.05  # a pass must promise so many tokens for one plain step's time
LEAST = 0.05  # of a plain step: what a draft costs at least, however well a busy machine measured
CREDIT, SHARE = 0.4, 0.02  # plain steps that drafts may have cost: at first, and of each token said
RATE, RETURN = 0.2, 0.01  # how fast the estimate follows what came true, and forgets it
PLACE = -1  # stands for a visual token, which is no word


class PromptLookup:
    """One answer's drafts.

    ends: tokens that end an answer. costs: gives the time of a pass with so many drafts, in plain
    steps; it is asked when the first token is out. drafted and accepted count drafts that were
    verified, and those that were right.
    """

    def __init__(
        self, inputs: Inputs, ends: Set[int], costs: Callable[[], Mapping[int, float]]
    ) -> None:
        words = inputs.input_ids[0].astype(np.int64)
        words[inputs.visual] = PLACE
        self._words: list[int] = words.tolist()
        self._prompt, self._indexed = len(self._words), 0
        self._ends, self._measure = ends, costs
        self._followed: dict[tuple[int, ...], int] = {}  # words -> where the next one stands
        self._begun: set[tuple[int, ...]] = set()  # the same words but for their last
        self.drafted = self.accepted = 0
        self._right, self._lost = 0.5, 0.0

    @cached_property
    def _costs(self) -> Mapping[int, float]:
        return self._measure()

    def said(self, token: mx.array | int) -> int:
        """Take note of a token of the answer, int[1] or its id, and give the id."""
        id = token if isinstance(token, int) else cast(int, token.item())
        self._words.append(id)
        return id

    def likely(self) -> bool:
        """Whether a draft may follow the token that is under way, which is not known here yet."""
        if len(self._words) == self._prompt:  # nothing holds up the first token
            return False
        self._index()
        return tuple(self._words[1 - WORDS :]) in self._begun and self._length(LENGTHS[-1]) > 0

    def _index(self) -> None:
        for place in range(max(self._indexed, WORDS), len(self._words)):
            before = tuple(self._words[place - WORDS : place])
            if PLACE not in before:
                self._followed[before] = place
                self._begun.add(before[:-1])
        self._indexed = len(self._words)

    def propose(self, most: int) -> list[int]:
        """What may come next, up to `most` tokens; none where nothing is known or worth a pass."""
        self._index()
        place = self._followed.get(tuple(self._words[-WORDS:]))
        length = self._length(most)
        if place is None or not length:
            return []
        draft: list[int] = []
        for at in range(place, place + length):
            beyond = at - len(self._words)  # what repeats goes on in the draft itself
            word = self._words[at] if beyond < 0 else draft[beyond]
            if word == PLACE or word in self._ends:
                break
            draft.append(word)
        return draft

    def _length(self, most: int) -> int:
        """The length that promises most tokens for its time; 0 where none is worth it."""
        best, length = WORTH, 0
        allowed = CREDIT + SHARE * (len(self._words) - self._prompt) - self._lost
        for size, cost in self._costs.items():
            tokens = min(size, most)
            promised = 1 + sum(self._right**place for place in range(1, tokens + 1))
            if tokens > length and promised / cost > best and cost - 1 <= allowed:
                best, length = promised / cost, tokens
        if not length:
            self._right += RETURN * (0.5 - self._right)
        return length

    def verified(self, draft: Sequence[int], right: int) -> None:
        """Of a draft the first `right` tokens were chosen."""
        if not draft:
            return
        self.drafted, self.accepted = self.drafted + len(draft), self.accepted + right
        for place in range(min(right + 1, len(draft))):
            self._right += RATE * ((place < right) - self._right)
        cost = next(cost for size, cost in self._costs.items() if size >= len(draft))
        self._lost += cost - 1 - right


def prompt_lookup(model: VisionLanguageModel, inputs: Inputs, ends: Set[int]) -> PromptLookup:
    """Drafts for one answer, at what passes cost with this model on this device."""
    return PromptLookup(inputs, ends, lambda: pass_costs(model))


def pass_costs(model: VisionLanguageModel) -> Mapping[int, float]:
    """Drafts in a pass -> its time in plain steps; lengths that can never pay are left out, and
    those of which an expert may drop some, which a plain step never does.

    Measured once, on the decoder's first layer, and remembered with the model.
    """
    if model.pass_costs is None:
        model.pass_costs = MappingProxyType(_measured(model))  # a dict would be parameters
    return model.pass_costs


def _measured(model: VisionLanguageModel) -> dict[int, float]:
    from ..language.mixture import Mixture

    language, costs = model.language_model, dict[int, float]()
    layer = language.model.layers[0]

    def seconds(rows: int) -> float:
        x = language.embed(mx.zeros((1, rows), mx.int32))
        mx.eval(x)
        started = time.perf_counter()
        mx.eval(layer(x, "causal" if rows > 1 else None, None))
        return time.perf_counter() - started

    mixtures = [part for part in language.modules() if isinstance(part, Mixture)]
    seconds(1)  # first use may compile
    for length in LENGTHS:
        if any(mixture.drops(1 + length) for mixture in mixtures):
            break
        pairs = [(seconds(1), seconds(1 + length)) for _ in range(ROUNDS)]
        cost = min(long for _, long in pairs) / min(one for one, _ in pairs)
        if cost * WORTH >= 1 + length:
            break
        costs[length] = max(cost, 1 + LEAST * length, *costs.values())
    return costs


def room(cache: Sequence[Cache]) -> int:
    """Positions that one pass may add so that caches are quantised where they would be without
    drafts, after a pass."""
    if isinstance(cache, QuantizingCaches) and isinstance(cache[0], KVCache):
        return max(1, cache.start - cache[0].offset)
    return 1 << 30


def decode_drafted(
    model: VisionLanguageModel,
    logits: mx.array,
    cache: list[Cache],
    budget: int,
    sample: TokenSampler,
    drafts: PromptLookup,
) -> Iterator[int]:
    """`loop.decode` with drafts: the same tokens. Where none is likely the next step is under way
    while a token is handed out; after a draft it waits for what came of it."""
    token, left = sample(logits), budget
    mx.async_eval(token)
    while left:
        if isinstance(cache, QuantizingCaches):
            cache.quantize()
        if left < 3 or not drafts.likely():
            following = sample(model.step(token, cache)) if left > 1 else token
            mx.async_eval(following)
            yield drafts.said(token)
            token, left = following, left - 1
            continue
        said = drafts.said(token)
        verifying = verified_together(model, said, left, cache, sample, drafts)
        yield said
        right, token = verifying.outcome()
        drafts.verified(verifying.draft, len(right))
        for one in right:
            yield drafts.said(one)
        left -= 1 + len(right)


def verified_together(
    model: VisionLanguageModel,
    said: int,
    left: int,
    cache: Sequence[Cache],
    sample: TokenSampler,
    drafts: PromptLookup,
) -> "Pass":
    """A token and as long a draft after it as may be, where `left` tokens may come with it."""
    draft = drafts.propose(min(left - 1, room(cache)) - 1)
    return Pass(model, said, draft, cache, sample)


class Pass:
    """A token and a draft after it, on their way through the model."""

    def __init__(
        self,
        model: VisionLanguageModel,
        said: int,
        draft: list[int],
        cache: Sequence[Cache],
        sample: TokenSampler,
    ) -> None:
        self.draft, self._cache, self._sample = draft, cache, sample
        self._logits = model.follow(mx.array([[said, *draft]]), cache)
        self._token = sample(self._logits[:, 0])
        mx.async_eval(self._token)

    def outcome(self) -> tuple[list[int], mx.array]:
        """The drafts that were right and the token after them, int[1]; the caches are as they
        would be without the others, also where nobody asks for more."""
        token, right = self._token, 0
        while right < len(self.draft) and token.item() == self.draft[right]:
            right += 1
            token = self._sample(self._logits[:, right])
        for layer in self._cache:
            layer.trim(len(self.draft) - right)
        return self.draft[:right], token
