"""Position ids of tiles of other sizes: the rule in whole numbers, for every size there is."""

import numpy as np
import pytest

from mlx_vlm_edge.vision.positions import position_ids


@pytest.mark.parametrize("side", [26, 27, 32])
def test_the_rule_is_the_references_for_every_size(side):
    """transformers 5's bucketize in float64, where its float32 form cannot be off."""
    boundaries = np.arange(1, side) / side
    for valid in range(1, side + 1):
        exact = np.minimum(np.arange(valid) / valid + 1e-12, 1 - 1e-6)
        buckets = np.searchsorted(boundaries, exact, side="right")
        ids = position_ids(valid, valid, side).reshape(valid, valid)
        assert np.array_equal(ids, buckets[:, None] * side + buckets[None]), valid


def test_a_full_tile_takes_the_table_as_it_is():
    assert np.array_equal(position_ids(5, 5, 5), np.arange(25))


def test_rows_and_columns_have_a_rule_each():
    assert position_ids(2, 3, 4).tolist() == [0, 1, 2, 8, 9, 10]
