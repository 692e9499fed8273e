"""Sampling against plain numpy, and stop strings against a letter-by-letter reference."""

import math
import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.sampling import (
    Sampling,
    StopStrings,
    drawing,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
    penalize,
    penalties,
)

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32)[None] + 3  # not normalised, as a model's


def kept(logits):
    return np.flatnonzero(np.isfinite(np.array(logits)[0])).tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.94, [1, 2, 3, 4]),
        (0.999, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_smallest_set(top_p, expected):
    assert kept(keep_top_p(mx.array(LOGITS), top_p)) == expected


def test_top_p_that_is_reached_exactly_keeps_no_more():
    logits = mx.array([[0.0, math.log(0.5), math.log(0.5)]])
    assert mx.softmax(logits).tolist() == [[0.5, 0.25, 0.25]]
    assert kept(keep_top_p(logits, 0.5)) == [0]


def test_top_p_of_random_logits():
    rng = np.random.default_rng(0)
    for scale in (0.1, 1, 30):
        logits = rng.normal(0, scale, (1, 1000)).astype(np.float32)
        exact = np.exp(logits[0].astype(np.float64) - logits.max())
        exact /= exact.sum()
        order = np.argsort(-exact)
        count = int(np.searchsorted(np.cumsum(exact[order]), 0.8)) + 1
        assert kept(keep_top_p(mx.array(logits), 0.8)) == sorted(order[:count].tolist())


def test_min_p_and_top_k():
    assert kept(keep_min_p(mx.array(LOGITS), 0.45)) == [1, 3, 4]
    assert kept(keep_min_p(mx.array(LOGITS), 1.0)) == [1]
    assert kept(keep_top_k(mx.array(LOGITS), 2)) == [1, 3]
    assert kept(keep_top_k(mx.array(LOGITS), 5)) == kept(keep_top_k(mx.array(LOGITS), 50))
    assert kept(keep_top_k(mx.zeros((1, 6)), 3)).__len__() == 3  # ties: still three


def frequencies(sampling, draws=4000):
    sample = make_sampler(sampling)
    tokens = [sample(mx.array(LOGITS)) for _ in range(draws)]
    assert tokens[0].shape == (1,)
    return np.bincount(np.array(mx.concatenate(tokens)), minlength=5) / draws


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(temperature=1.0, seed=1), PROBABILITIES),
        (Sampling(temperature=0.5, seed=2), PROBABILITIES**2),
        (Sampling(temperature=2.0, top_p=0.0, seed=3), PROBABILITIES**0.5),
        # The filters look at the untempered distribution, as mlx-lm's.
        (Sampling(temperature=2.0, top_p=0.6, seed=4), PROBABILITIES**0.5 * [0, 1, 0, 1, 0]),
        (Sampling(temperature=1.0, top_k=3, min_p=0.6, seed=5), PROBABILITIES * [0, 1, 0, 1, 0]),
    ],
)
def test_draws_have_the_right_frequencies(sampling, weights):
    expected = weights / weights.sum()
    assert np.abs(frequencies(sampling) - expected).max() < 4 * math.sqrt(0.25 / 4000)


def test_greedy_is_the_argmax_and_takes_the_first_of_ties():
    sample = make_sampler(Sampling())
    assert sample(mx.array(LOGITS)).tolist() == [1]
    assert sample(mx.array([[0.0, 2.0, 2.0]], mx.bfloat16)).tolist() == [1]


def test_a_seed_repeats_whatever_else_draws():
    def run(seed):
        sample = make_sampler(Sampling(temperature=1.5, seed=seed))
        tokens = []
        for _ in range(30):
            mx.eval(mx.random.uniform(shape=(3,)))  # the global state must not matter
            tokens.append(sample(mx.array(LOGITS)).item())
        return tokens

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)
    assert len(set(run(7))) > 2  # the key moves on


def test_repetition_penalty_equals_the_formula_and_counts_a_token_once():
    logits = np.array([[2.0, -2.0, 1.0, -1.0, 0.5]], np.float32)
    tokens = mx.array([0, 1, 1, 0, -200, 99])  # -200 and 99 are no vocabulary entries
    got = np.array(penalize(tokens, mx.array(logits), 2.0))
    assert got.tolist() == [[1.0, -4.0, 1.0, -1.0, 0.5]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "hot"), ("temperature", True), ("top_p", 1.5), ("top_p", -1),
        ("min_p", 2), ("top_k", -1), ("top_k", 2.5), ("repetition_penalty", 0),
        ("repetition_penalty", None), ("repetition_context_size", 0), ("seed", -1),
        ("seed", 2**64),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})


def cut(text, stops):
    """The text up to the stop string that is completed first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_stop_strings_in_any_pieces():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(12)))
        stops = [
            "".join(rng.choice("abc") for _ in range(rng.randint(1, 4)))
            for _ in range(rng.randrange(3))
        ]
        stream, shown, rest = StopStrings(stops), "", text
        while rest:
            size = rng.randint(1, 4)
            shown, rest = shown + stream.feed(rest[:size]), rest[size:]
        shown += stream.flush()
        assert (shown, stream.stopped) == cut(text, stops), (text, stops)


def test_text_is_held_back_no_longer_than_needed():
    stream = StopStrings("</s>")
    assert [stream.feed(piece) for piece in ("a<", "/", "b", "<b></", "s>tail", "more")] == [
        "a", "", "</b", "<b>", "", "",
    ]  # fmt: skip
    assert stream.stopped
    assert stream.flush() == ""
    assert StopStrings().feed("anything") == "anything"
    with pytest.raises(UsageError, match="stop"):
        StopStrings(["a", ""])


def nodes(tmp_path, *arrays):
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), *arrays)
    return path.read_text().count("shape=rectangle")


EVERYTHING = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "top_k": 40, "seed": 1}


def test_a_draw_is_one_compiled_graph_where_mlx_compiles(tmp_path, monkeypatch):
    logits = mx.array(np.random.default_rng(0).normal(0, 3, (1, 500)).astype(np.float32))
    plain = make_sampler(Sampling(**EVERYTHING))(logits)
    before = nodes(tmp_path, plain)
    monkeypatch.setattr("mlx_vlm_edge.kernels.on_cpu", lambda: False)
    fused = make_sampler(Sampling(**EVERYTHING))(logits)
    assert nodes(tmp_path, fused) <= 0.75 * before
    again = make_sampler(Sampling(**EVERYTHING | {"seed": 2}))
    assert again(logits).shape == (1,)
    assert drawing.cache_info().hits, "the next answer has the same graph"


def test_penalties_are_one_compiled_graph_where_mlx_compiles(tmp_path, monkeypatch):
    arrays = mx.zeros((1, 500)), mx.array([1, 2, 3]), mx.zeros(500)
    plain = nodes(tmp_path, penalties(1.3, 0.5, 0.25)(*arrays))
    monkeypatch.setattr("mlx_vlm_edge.kernels.on_cpu", lambda: False)
    assert nodes(tmp_path, penalties(1.3, 0.5, 0.25)(*arrays)) <= 0.75 * plain
