"""A prompt and a given answer -> what a model thinks of each of its tokens; two of these compared.

Both are led along the same answer (teacher forcing), so that one early difference does not decide
everything after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.language.decoder import PREFILL_STEP
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.text.prompt import Inputs

POSITIONS = 32


@dataclass(frozen=True)
class Forced:
    """ids: the answer. logprobs: float32[positions, V] before each of its tokens."""

    ids: tuple[int, ...]
    logprobs: np.ndarray


def forced(
    model: VisionLanguageModel,
    inputs: Inputs,
    answer: Sequence[int] | None = None,
    positions: int = POSITIONS,
) -> Forced:
    """Lead a model along an answer; without one, along its own greedy one."""
    cache = model.make_cache()
    logits = model.prefill(inputs, cache, PREFILL_STEP)
    ids, rows = [], []
    for index in range(positions):
        row = logits[0].astype(mx.float32)
        rows.append(np.array(row - mx.logsumexp(row)))
        ids.append(int(rows[-1].argmax()) if answer is None else answer[index])
        if index + 1 < positions:
            logits = model.step(mx.array([ids[-1]]), cache)
    return Forced(tuple(ids), np.stack(rows))


@dataclass(frozen=True)
class Agreement:
    """top1: share of positions with the same likeliest token. kl: mean divergence of what `other`
    expects from what all visual tokens do, in nats."""

    top1: float
    kl: float


def agreement(whole: Forced, other: Forced) -> Agreement:
    """KL(p || q) = sum p (log p - log q), p with all visual tokens, the mean over positions."""
    p, q = whole.logprobs.astype(np.float64), other.logprobs.astype(np.float64)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    same = p.argmax(axis=1) == q.argmax(axis=1)
    return Agreement(float(same.mean()), float(max(0.0, divergence.mean())))
