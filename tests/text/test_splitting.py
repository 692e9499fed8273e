"""Splitting images into tiles: the grids of the facts, the reference's pixels at odd sizes."""

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_edge.picture.tiling import (
    affordable_edge,
    longest_edge_size,
    single,
    split,
    split_grid,
    whole_tiles_size,
)

# Tile edges of the published models and the visual tokens of one tile.
PUBLISHED = {"idefics3-8b": (364, 169), "smolvlm-2.2b": (384, 81), "smolvlm-256m": (512, 64)}
TOKENS = {  # per image, for 17, 13, 9 and 5 tiles
    "idefics3-8b": (2873, 2197, 1521, 845),
    "smolvlm-2.2b": (1377, 1053, 729, 405),
    "smolvlm-256m": (1088, 832, 576, 320),
}
SHAPES = {
    17: [(336, 336), (1000, 1000), (10, 10)],
    13: [(640, 480), (1920, 1080), (1080, 1920), (480, 640)],
    9: [(1170, 2532)],
    5: [(3000, 500), (50_000, 3)],
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_tokens_per_image_of_the_published_sizes(model):
    tile, tokens = PUBLISHED[model]
    for (tiles, sizes), wanted in zip(SHAPES.items(), TOKENS[model], strict=True):
        for size in sizes:
            rows, columns = split_grid(size, 4 * tile, tile)
            assert rows * columns + 1 == tiles, size
            assert (rows * columns + 1) * tokens == wanted


def test_the_worked_examples():
    assert longest_edge_size((640, 480), 1456) == (1456, 1092)
    assert longest_edge_size((3000, 500), 1456) == (1456, 242)
    assert whole_tiles_size((1456, 820), 364) == (1456, 1092)
    assert split_grid((640, 480), 1456, 364) == (3, 4)
    assert split_grid((640, 480), 364, 364) == (0, 0)
    assert affordable_edge((640, 480), 1456, 364, 8) == 728
    assert affordable_edge((640, 480), 1456, 364, 13) == 1456
    assert affordable_edge((640, 480), 1456, 364, 1) == 364


SIZES = [(5, 5), (2, 900), (900, 2), (31, 33), (33, 31), (97, 64), (64, 97), (200, 200), (255, 60)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tile", "longest"), [(16, 64), (38, 152), (16, 50), (32, 32), (16, 96)])
def test_the_reference_cuts_the_same_tiles(size, tile, longest):
    from ..reference import idefics3 as theirs

    image = theirs.picture(sum(size), *size)
    case = theirs.CASES["idefics3"]
    edges = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    processor = theirs.image_processor(case, do_rescale=False, do_normalize=False, **edges)
    found = processor([[image]], return_row_col_info=True, return_tensors="np")
    want = found["pixel_values"][0].transpose(0, 2, 3, 1)
    assert split_grid(size, longest, tile) == (found["rows"][0][0], found["cols"][0][0])
    assert np.array_equal(split(Image.fromarray(image), longest, tile), want)
    whole = processor([[image]], do_image_splitting=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(
        single(Image.fromarray(image), longest, tile), whole.transpose(0, 2, 3, 1)
    )


def test_an_edge_beyond_the_limit_is_brought_below_it():
    """The reference enlarges to the longest edge, then shrinks to 4096, here 9 tiles of 500."""
    assert longest_edge_size((100, 50), 5000) == (4096, 2048)
    assert split_grid((100, 50), 5000, 500) == (5, 9)
