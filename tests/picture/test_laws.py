"""Laws of preprocessing, whatever the picture's size: geometry, tiles, padding, resampling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_vlm_edge.picture import tiling
from mlx_vlm_edge.picture.image import fit
from mlx_vlm_edge.picture.resample import PRECISION, Axis, bicubic, hamming

SIDE = st.integers(1, 6000)
SIZE = st.tuples(SIDE, SIDE)
SMALL = st.tuples(st.integers(1, 90), st.integers(1, 90))
laws = settings(max_examples=150, deadline=None, derandomize=True)


@laws
@given(SIZE, SIZE)
def test_a_scaled_picture_touches_its_target_and_stays_in_it(size, target):
    width, height = tiling.scaled_size(size, target)
    assert 1 <= width <= target[0]
    assert 1 <= height <= target[1]
    assert (width, height)[0] == target[0] or height == target[1]
    # Its shape is the picture's, to the rounding of one side.
    assert abs(width * size[1] - height * size[0]) <= max(size)


@laws
@given(SIZE, SIZE)
def test_fitting_within_never_enlarges(size, limit):
    width, height = tiling.fit_within(size, limit)
    assert 1 <= width <= min(size[0], limit[0])
    assert 1 <= height <= min(size[1], limit[1])
    assert (width, height) == size or width > size[0] * min(
        limit[0] / size[0], limit[1] / size[1]
    ) - 1
    assert tiling.fit_within((width, height), limit) == (width, height)


@laws
@given(SIZE, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9))
def test_the_best_resolution_is_one_of_them_and_none_shows_more(size, grids):
    candidates = [(384 * columns, 384 * rows) for columns, rows in grids]

    def shown(target):
        scale = min(target[0] / size[0], target[1] / size[1])
        return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

    best = tiling.best_resolution(size, candidates)
    assert best in candidates
    assert shown(best) == max(map(shown, candidates))
    assert all(best[0] * best[1] <= other[0] * other[1]
               for other in candidates if shown(other) == shown(best))  # fmt: skip


@laws
@given(SIZE, st.tuples(st.integers(1, 120), st.integers(1, 120)))
def test_what_is_cut_off_again_is_the_padding_and_as_much_on_both_sides(size, grid):
    box = tiling.unpad(size, grid)
    assert box.top * 2 + box.height == grid[0]
    assert box.left * 2 + box.width == grid[1]
    assert box.top == 0 or box.left == 0
    assert box.height >= 0
    assert box.width >= 0


@laws
@given(SIZE, st.sampled_from([364, 384, 512]), st.integers(1, 6), st.integers(1, 40))
def test_idefics3_s_grid_is_whole_tiles_and_as_many_as_may_be(size, tile, edges, limit):
    longest = tile * edges
    width, height = tiling.whole_tiles_size(tiling.longest_edge_size(size, longest), tile)
    assert width % tile == height % tile == 0
    rows, columns = tiling.split_grid(size, longest, tile)
    assert (rows, columns) in ((0, 0), (height // tile, width // tile))
    assert max(rows, columns) <= -(-tiling.MAX_EDGE // tile)
    edge = tiling.affordable_edge(size, longest, tile, limit)
    assert edge == longest or edge % tile == 0
    assert tile <= edge <= longest
    rows, columns = tiling.split_grid(size, edge, tile)
    assert edge == tile or rows * columns + 1 <= limit


@laws
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_tiles_put_together_are_the_picture(rows, columns, side, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (rows * side, columns * side, 3), "u1")
    tiles = tiling.cut(picture, side)
    assert tiles.shape == (rows * columns, side, side, 3)
    lines = [np.hstack(tiles[row * columns : (row + 1) * columns]) for row in range(rows)]
    assert np.array_equal(np.vstack(lines), picture)


@pytest.mark.parametrize("strategy", ["pad", "center_crop", "stretch"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(SMALL, st.tuples(st.integers(4, 48), st.integers(4, 48)))
def test_a_plain_picture_stays_plain(strategy, size, target):
    """Of the size that was asked for, and of its own colour where there is no padding."""
    colour, fill = (200, 30, 120), (10, 240, 60)
    fitted = np.asarray(fit(Image.new("RGB", size, colour), target, strategy, fill)).astype(int)
    assert fitted.shape == (target[1], target[0], 3)
    if strategy != "pad":
        assert (np.abs(fitted - colour) <= 1).all()
        return
    # A mix of the two colours everywhere, to the overshoot of a bicubic edge, and as symmetric.
    low, high = np.minimum(colour, fill), np.maximum(colour, fill)
    assert (fitted >= low - 25).all()
    assert (fitted <= high + 25).all()


@pytest.mark.parametrize("kernel", [(bicubic, 2.0), (hamming, 1.0)], ids=["bicubic", "hamming"])
@laws
@given(st.integers(1, 3000), st.integers(1, 300), st.data())
def test_weights_of_a_resize_add_up_to_one_and_windows_move_on(kernel, total, size, data):
    axis = Axis(total, size, *kernel)
    output = data.draw(st.integers(0, size - 1))
    low, high = axis.window(output)
    assert 0 <= low < high <= total
    assert axis.weights(output).sum() == pytest.approx(1 << PRECISION, abs=high - low)
    if output:
        before = axis.window(output - 1)
        assert before[0] <= low
        assert before[1] <= high
