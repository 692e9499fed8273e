"""Each method against a float64 reference that is written from its equations."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge.picture.token_budget import Block, TokenBudget, cut, planned
from mlx_vlm_edge.reduction import METHODS, choosing, reduced
from mlx_vlm_edge.reduction.blocks import picture_places, staying_places
from mlx_vlm_edge.reduction.pooling import order

from ..parity import FLOAT32, distance

SHAPES = {
    "a square": [Block(6, 6)],
    "a class token": [Block(5, 5, before=1)],
    "a newline behind": [Block(4, 6, after=1)],
    "rows that end": [Block(5, 7, ended=True, before=1)],
    "a whole image and rows": [Block(4, 4), Block(6, 9, ended=True)],
    "tiles": [Block(3, 3)] * 5,
}


def tokens_of(blocks, seed=0, width=64):
    """Tokens of directions far apart, so that no choice hangs on a rounding."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(sum(block.total for block in blocks), width)).astype(np.float32)


def cosine(tokens):
    x = tokens.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similar = x @ x.T
    np.fill_diagonal(similar, 1)  # which rounding may miss by a bit
    return similar


def divprune(tokens, count):
    """d_ij = 1 - cos(i, j); first argmax_i min_{j != i} d_ij, then argmax_i min_{j in S} d_ij."""
    distance_of = 1 - cosine(tokens)
    n = len(tokens)
    chosen = [max(range(n), key=lambda i: min(distance_of[i, j] for j in range(n) if j != i))]
    while len(chosen) < count:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance_of[i, j] for j in chosen)))
    return chosen


def dpp(tokens, count):
    """The greedy search for a likely set S: the token with the largest det L_{S + i}, L = cos."""
    kernel, chosen = cosine(tokens), []
    while len(chosen) < count:
        rest = [i for i in range(len(tokens)) if i not in chosen]
        volumes = [np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]) for i in rest]
        chosen.append(rest[int(np.argmax(volumes))])
    return chosen


REFERENCES = {"divprune": divprune, "dpp": dpp}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_as_the_equations_have_it(method, shape, share):
    blocks = SHAPES[shape]
    tokens, plan = tokens_of(blocks), planned(TokenBudget(share, method), blocks)
    wanted, start = [], 0
    for part in plan.cuts:
        body = picture_places(part.block)
        own = tokens[start + body]
        picked = body[REFERENCES[method](own, part.tokens)]
        wanted += [start + place for place in sorted([*picked, *staying_places(part)])]
        start += part.block.total
    assert len(wanted) == plan.total
    got = np.array(reduced(mx.array(tokens), plan))
    assert np.array_equal(got, tokens[wanted])


@pytest.mark.parametrize("shape", SHAPES)
def test_pooled_tokens_are_the_means_of_windows(shape):
    """Every token of the picture is in one window, and windows are rectangles in reading order."""
    blocks = SHAPES[shape]
    tokens, plan = tokens_of(blocks), planned(TokenBudget(0.4, "pool"), blocks)
    wanted, start = [], 0
    for part in plan.cuts:
        block = part.block
        body = tokens[start + picture_places(block)].astype(np.float64)
        grid = body.reshape(block.rows, block.columns, -1)
        means = []
        for line in range(part.lines):
            top, bottom = (at * block.rows // part.lines for at in (line, line + 1))
            count = (line + 1) * part.tokens // part.lines - line * part.tokens // part.lines
            for window in range(count):
                left, right = (at * block.columns // count for at in (window, window + 1))
                means.append(grid[top:bottom, left:right].mean(axis=(0, 1)))
        staying = tokens[start + staying_places(part)]
        wanted += list(np.concatenate([means, staying])[order(part)])
        start += block.total
    got = np.array(reduced(mx.array(tokens), plan))
    assert got.shape == (plan.total, tokens.shape[1])
    assert distance(got, np.array(wanted)) < FLOAT32


def test_a_quarter_is_two_by_two_pooling():
    plan = planned(TokenBudget(0.25, "pool"), [Block(6, 8)])
    tokens = tokens_of([Block(6, 8)])
    wanted = tokens.reshape(3, 2, 4, 2, -1).mean(axis=(1, 3)).reshape(12, -1)
    assert distance(reduced(mx.array(tokens), plan), wanted) < FLOAT32


def test_what_stays_is_not_averaged():
    """The model's own separators and class token come through bit by bit."""
    block = Block(4, 4, ended=True, before=1)
    tokens = tokens_of([block])
    plan = planned(TokenBudget(9, "pool"), [block])
    got = np.array(reduced(mx.array(tokens), plan))
    assert plan.cuts[0].lines == 3
    assert np.array_equal(got[0], tokens[0])
    assert np.array_equal(got[-1], tokens[-1])
    ends = [row for row in got if any(np.array_equal(row, tokens[at]) for at in (5, 10, 15, 20))]
    assert len(ends) == 3


def test_random_tokens_are_the_same_every_time():
    blocks = [Block(6, 6, before=1), Block(3, 3, ended=True)]
    tokens, plan = tokens_of(blocks), planned(TokenBudget(20, "random"), blocks)
    one, other = (np.array(reduced(mx.array(tokens), plan)) for _ in range(2))
    assert one.shape == (20, tokens.shape[1])
    assert np.array_equal(one, other)
    places = [int(np.flatnonzero((tokens == row).all(axis=1))[0]) for row in one]
    assert places == sorted(set(places))
    assert places[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_what_was_counted_in_order(method):
    """Each number from the fewest to all but one, with a class token and separators."""
    block = Block(3, 4, ended=True, before=1)
    tokens = tokens_of([block], width=8)
    for total in range(block.fewest, block.total):
        plan = planned(TokenBudget(total, method), [block])
        assert reduced(mx.array(tokens), plan).shape == (total, 8)


@pytest.mark.parametrize("method", ["divprune", "dpp"])
def test_equal_tokens_are_chosen_once_each(method):
    plan = planned(TokenBudget(5, method), [Block(3, 3)])
    got = np.array(reduced(mx.ones((9, 4)), plan))
    assert got.shape == (5, 4)
    pick = choosing.by_distance if method == "divprune" else choosing.by_volume
    assert len({*pick(np.ones((9, 9), np.float32), 5)}) == 5


def test_a_token_of_zeros_is_no_division_by_zero():
    tokens = tokens_of([Block(3, 3)])
    tokens[4] = 0
    for method in METHODS:
        got = np.array(reduced(mx.array(tokens), planned(TokenBudget(4, method), [Block(3, 3)])))
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("method", "waits"), [("divprune", 1), ("dpp", 1), ("pool", 0), ("random", 0)]
)
def test_choosing_waits_once_a_picture_however_many_parts(method, waits, monkeypatch):
    blocks, counted, evaluate = SHAPES["tiles"], [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (counted.append(1), evaluate(*arrays)))
    tokens = mx.array(tokens_of(blocks))
    reduced(tokens, planned(TokenBudget(17, method), blocks))
    assert len(counted) == waits


@pytest.mark.parametrize("method", METHODS)
def test_launches_do_not_grow_with_the_tokens(method, tmp_path):
    """No operation of the graph for every token that is chosen."""

    def nodes(total):
        plan = planned(TokenBudget(total, method), [Block(12, 12)])
        path = tmp_path / "graph.dot"
        fewer = reduced(mx.array(tokens_of([Block(12, 12)])) * 2, plan)
        mx.export_to_dot(str(path), fewer)
        return path.read_text().count("shape=rectangle")

    assert nodes(20) == nodes(100) < 40


def test_a_cut_keeps_the_shape_of_the_picture():
    assert cut(Block(24, 24), 144).lines == 12
    assert cut(Block(6, 12), 18).lines == 3
    assert cut(Block(24, 24, ended=True), 150).lines == 12
