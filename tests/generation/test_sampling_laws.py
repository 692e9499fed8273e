"""Laws of sampling: which tokens may come, whatever the logits, and how often they do."""

import math

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_vlm_edge.generation.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
    penalize,
)

# Distinct ones: which of two equally likely tokens is left out is nobody's law.
LOGITS = st.lists(st.integers(-400, 400), min_size=2, max_size=24, unique=True)
SHARE = st.floats(0.01, 0.99)
laws = settings(max_examples=120, deadline=None, derandomize=True)


def row(logits):
    return mx.array([[value / 40 for value in logits]])


def likely(logits):
    """float64 probabilities [V]."""
    powers = np.exp(np.array(logits, dtype=np.float64) / 40)
    return powers / powers.sum()


def places(array):
    return {int(index) for index in np.flatnonzero(np.isfinite(np.array(array)[0]))}


@laws
@given(LOGITS, SHARE)
def test_top_p_is_the_smallest_set_that_reaches_it(logits, share):
    probabilities, chosen = likely(logits), places(keep_top_p(row(logits), share))
    order = sorted(chosen, key=lambda token: probabilities[token])
    assert chosen == {int(token) for token in np.argsort(-probabilities)[: len(chosen)]}
    assert sum(probabilities[token] for token in chosen) >= share - 1e-5
    assert sum(probabilities[token] for token in order[1:]) < share + 1e-5


@laws
@given(LOGITS, st.integers(1, 30))
def test_top_k_are_k_and_the_likeliest(logits, k):
    chosen = places(keep_top_k(row(logits), k))
    assert chosen == {int(token) for token in np.argsort(-np.array(logits))[:k]}


@laws
@given(LOGITS, SHARE)
def test_min_p_is_held_against_the_likeliest(logits, share):
    probabilities, chosen = likely(logits), places(keep_min_p(row(logits), share))
    assert int(np.argmax(logits)) in chosen
    for token, probability in enumerate(probabilities):
        ratio = probability / probabilities.max() / share
        if abs(ratio - 1) > 1e-5:
            assert (token in chosen) == (ratio > 1)


@laws
@given(LOGITS, SHARE, st.integers(1, 8), SHARE, st.floats(0.1, 3.0), st.integers(0, 2**32))
def test_a_draw_is_one_of_what_every_filter_leaves(logits, top_p, top_k, min_p, heat, seed):
    sampling = Sampling(temperature=heat, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    allowed = places(keep_top_k(keep_min_p(keep_top_p(row(logits), top_p), min_p), top_k))
    drawn = [make_sampler(sampling)(row(logits)).item() for _ in range(2)]
    assert drawn[0] == drawn[1], "the seed decides"
    assert drawn[0] in allowed


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.integers(-60, 60), min_size=2, max_size=6), st.sampled_from([0.5, 1.0, 2.0]))
def test_tokens_come_as_often_as_they_are_likely(logits, heat):
    """800 draws: no token is off by more than five standard deviations."""
    sample, count = make_sampler(Sampling(temperature=heat, seed=1)), 800
    drawn = [sample(row(logits)) for _ in range(count)]
    seen = np.bincount(np.array(mx.concatenate(drawn)), minlength=len(logits))
    wanted = likely([value / heat for value in logits])
    spread = np.sqrt(count * wanted * (1 - wanted)) + 1
    assert (np.abs(seen - count * wanted) < 5 * spread).all()


@laws
@given(LOGITS, st.lists(st.integers(-5, 40), max_size=12), st.floats(1.01, 3.0))
def test_a_penalty_is_of_the_seen_once_and_never_makes_them_likelier(logits, seen, penalty):
    before = np.array(row(logits))[0]
    tokens = mx.array(seen, mx.int32) if seen else mx.zeros((0,), mx.int32)
    after = np.array(penalize(tokens, row(logits), penalty))[0]
    for token, value in enumerate(before):
        if token in seen:
            wanted = value * penalty if value < 0 else value / penalty
            assert math.isclose(after[token], wanted, rel_tol=1e-6)
            assert after[token] <= value
        else:
            assert after[token] == value
