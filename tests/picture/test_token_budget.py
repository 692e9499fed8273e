"""How many visual tokens a budget leaves, of which part of a picture."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.token_budget import (
    TOGETHER,
    Block,
    TokenBudget,
    bounds,
    check_method,
    cut,
    parse_tokens,
    planned,
    token_budget,
)

BLOCKS = st.builds(
    Block, st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 1), st.integers(0, 1)
)


@pytest.mark.parametrize(
    ("text", "tokens"), [("64", 64), ("0.25", 0.25), ("25%", 0.25), ("1.0", 1.0), ("1e-1", 0.1)]
)
def test_numbers_and_shares_are_read(text, tokens):
    assert parse_tokens(text) == tokens
    assert type(parse_tokens(text)) is type(tokens)


@pytest.mark.parametrize("text", ["", "many", "0x10", "64,5", "nan", "%", "¼"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(UsageError, match=r"visual tokens .*: give a number, as 64, or a share"):
        parse_tokens(text)


@pytest.mark.parametrize("tokens", [0, -1, 0.0, -0.5, 1.5, 64.0, True, "64", float("inf")])
def test_what_cannot_be_is_refused(tokens):
    with pytest.raises(UsageError, match=r"visual tokens .*: give a whole number of at least 1"):
        TokenBudget(tokens)


def test_a_method_needs_a_number_and_a_name():
    assert token_budget(None, None) is None
    assert token_budget(8, None) == TokenBudget(8, "divprune")
    with pytest.raises(UsageError, match="say how many"):
        token_budget(None, "pool")
    with pytest.raises(UsageError, match="'best' is not one of divprune, dpp"):
        token_budget(8, "best")
    with pytest.raises(UsageError, match="'visionzip' is not defined for this model: it has pool"):
        check_method("visionzip", frozenset({"pool"}))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(block=BLOCKS, data=st.data())
def test_a_cut_has_as_many_tokens_as_were_asked_for(block, data):
    total = data.draw(st.integers(block.fewest, block.total))
    part = cut(block, total)
    assert part.total == total
    assert 1 <= part.lines <= block.rows
    assert 1 <= part.tokens <= part.lines * block.columns  # of pooled ones, no line has too many
    assert cut(block, block.total).lines * block.ended == block.rows * block.ended


@settings(max_examples=300, deadline=None, derandomize=True)
@given(blocks=st.lists(BLOCKS, min_size=1, max_size=5), data=st.data())
def test_parts_get_their_share(blocks, data):
    whole, fewest = sum(b.total for b in blocks), sum(b.fewest for b in blocks)
    wanted = data.draw(st.integers(fewest, whole))
    plan = planned(TokenBudget(wanted), blocks)
    if wanted == whole:
        assert plan is None
        return
    assert plan.total == wanted
    for part, block in zip(plan.cuts, blocks, strict=True):
        assert block.fewest <= part.total <= block.total


def test_equal_tiles_differ_by_one_at_most():
    plan = planned(TokenBudget(100), [Block(8, 8)] * 17)
    counts = [part.total for part in plan.cuts]
    assert sum(counts) == 100
    assert {*counts} == {5, 6}


def test_too_many_and_too_few():
    with pytest.raises(UsageError, match="visual tokens 17: the picture has 16"):
        planned(TokenBudget(17), [Block(4, 4)])
    with pytest.raises(UsageError, match=r"4 of 320 are too few .* need 5"):
        planned(TokenBudget(4), [Block(8, 8)] * 5)
    assert planned(TokenBudget(1.0), [Block(4, 4)]) is None
    assert planned(TokenBudget(0.001), [Block(4, 4)]).total == 1


def test_large_blocks_are_taken_in_bands():
    """All pairs of 6,642 tokens would be 176 MB."""
    block = Block(81, 81, ended=True, before=1, after=2)
    bands = block.bands()
    assert len(bands) == 3
    assert sum(band.total for band in bands) == block.total
    assert all(band.total <= TOGETHER for band in bands)
    assert (bands[0].before, bands[-1].after) == (1, 2)
    for one in (Block(24, 24), Block(50, 50, ended=True)):  # LLaVA's, and EVEv2's largest square
        assert one.bands() == (one,)
    assert 4 * TOGETHER**2 < 28e6  # bytes of all pairs
    assert len(Block(1, 9999).bands()) == 1


def test_bounds_cover_all_of_it():
    assert bounds(7, 3) == [0, 2, 4, 7]
    assert bounds(2, 1) == [0, 2]
