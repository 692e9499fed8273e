"""Position ids of partly filled tiles: the rule in whole numbers, for every size there is."""

import numpy as np
import pytest

from mlx_vlm_edge.vision.positions import patch_mask, position_ids


@pytest.mark.parametrize("side", [26, 27, 32])
def test_the_rule_is_the_references_for_every_size(side):
    """transformers 5's bucketize in float64, where its float32 form cannot be off."""
    boundaries = np.arange(1, side) / side
    for valid in range(1, side + 1):
        mask = np.zeros((1, side, side), bool)
        mask[:, :valid, :valid] = True
        ids = position_ids(mask, side).reshape(side, side)[:valid, :valid]
        exact = np.minimum(np.arange(valid) / valid + 1e-12, 1 - 1e-6)
        buckets = np.searchsorted(boundaries, exact, side="right")
        assert np.array_equal(ids, buckets[:, None] * side + buckets[None]), valid


def test_a_full_tile_takes_the_table_as_it_is():
    ids = position_ids(np.ones((2, 5, 5), bool), 5)
    assert np.array_equal(ids, np.broadcast_to(np.arange(25), (2, 25)))


def test_padding_takes_entry_0_and_each_tile_its_own_rule():
    mask = np.zeros((2, 4, 4), bool)
    mask[0, :2, :3] = True
    mask[1] = True
    first, second = position_ids(mask, 4)
    assert first.reshape(4, 4).tolist() == [[0, 1, 2, 0], [8, 9, 10, 0], [0] * 4, [0] * 4]
    assert second.tolist() == list(range(16))


def test_a_patch_with_any_picture_in_it_is_picture():
    mask = np.zeros((1, 5, 5), bool)
    mask[0, 0, 0] = mask[0, 3, 2] = mask[0, 4, 4] = True  # the last row and column fill no patch
    assert patch_mask(mask, 2).tolist() == [[[True, False], [False, True]]]
    assert patch_mask(np.array([[[1, 1, 1, 0]] * 2], bool), 2).tolist() == [[[True, True]]]
