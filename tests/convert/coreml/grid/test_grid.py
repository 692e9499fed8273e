"""Pairs of the grid's options: verified, or refused with one line, and two interpreters agree."""

import re

import pytest

from .cells import Grid, pairwise

CHOSEN = pairwise()


@pytest.fixture(scope="module")
def grid(tools, tmp_path_factory):
    return Grid(tmp_path_factory.mktemp("grid") / "root")


@pytest.mark.parametrize("cell", CHOSEN, ids=str)
def test_a_cell_is_verified_or_refused_with_one_line(grid, cell):
    outcome = grid.run(cell)
    assert (outcome.refusal is not None) is cell.refused
    if outcome.refusal:
        assert "\n" not in outcome.refusal
        assert re.search(r"--bits [48] with --compute cpu-ne: .* use --bits", outcome.refusal)
