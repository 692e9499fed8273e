"""Palettes against the best there are: exact k-means of small sets, by trying every cut."""

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.emit.palettes import palette

RANDOM = np.random.default_rng(0)
SHAPE = (16, 24)


def normal():
    return RANDOM.normal(size=SHAPE)


def pruned(share):
    weights = normal()
    weights[RANDOM.random(SHAPE) < share] = 0
    return weights


def outlier_column():
    weights = normal() * 0.02
    weights[:, 5] *= 40
    return weights


WEIGHTS = {
    "normal": normal(), "half pruned": pruned(0.5), "mostly pruned": pruned(0.9),
    "one outlier": np.where(np.arange(384).reshape(SHAPE) == 7, 3, normal() * 0.02),
    "an outlier column": outlier_column(), "heavy tails": RANDOM.standard_t(2, SHAPE),
}  # fmt: skip


def best_error(values, count):
    """The least squared error of so many numbers for sorted values: every cut is tried."""
    values = np.sort(values.astype(np.float64))
    sums, squares = (np.r_[0, np.cumsum(values**power)] for power in (1, 2))
    counts = np.arange(len(values) + 1)[None] - np.arange(len(values) + 1)[:, None]
    spread = (
        squares[None] - squares[:, None] - (sums[None] - sums[:, None]) ** 2 / np.maximum(counts, 1)
    )
    spread[counts <= 0] = np.inf
    least = spread[0]
    for _ in range(count - 1):
        least = (least[:, None] + spread).min(0)
    return least[-1]


def error_of(weights, bits):
    return np.square(palette(weights, bits).dense() - weights, dtype=np.float64).sum()


@pytest.mark.parametrize("name", WEIGHTS)
def test_palettes_are_within_a_hundredth_of_the_best(name):
    weights = WEIGHTS[name].astype(np.float32)
    assert error_of(weights, 4) <= 1.02 * best_error(weights.reshape(-1), 16)


@pytest.mark.parametrize("name", WEIGHTS)
def test_64_values_leave_a_fraction_of_the_error(name):
    """A sixteenth, of many values that are spread evenly."""
    weights = WEIGHTS[name].astype(np.float32)
    assert error_of(weights, 6) <= error_of(weights, 4) / 12


@pytest.mark.parametrize("values", [
    [0.0], [0.3], [-1.0, 1.0], np.linspace(-1, 1, 16), [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -6],
], ids=["zeros", "one", "two", "sixteen", "fp4"])  # fmt: skip
def test_what_has_no_more_values_than_a_palette_keeps_them(values):
    weights = RANDOM.choice(np.asarray(values, np.float32), (32, 64))
    assert np.array_equal(palette(weights, 4).dense(), weights)


def test_tables_ascend_and_every_index_is_in_them():
    chosen = palette(RANDOM.normal(size=(48, 40)).astype(np.float32), 4)
    assert chosen.table.shape == (3, 16)
    assert (np.diff(chosen.table) >= 0).all()
    assert chosen.data.max() < 16
