"""Tiles and their geometry, against transformers' functions and the original's."""

import math

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_edge.picture.tiling import (
    Box,
    anyres_tiles,
    best_resolution,
    capped,
    cut,
    scaled_size,
    unpad,
)

GRID = [(384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)]
SIDES = (1, 2, 27, 100, 384, 385, 640, 767, 768, 1000, 1021, 1243, 1920, 2304, 4032)
SIZES = [(width, height) for width in SIDES for height in SIDES]


def test_the_worked_examples():
    assert best_resolution((640, 480), [(384, 384), (768, 384), (768, 768)]) == (768, 768)
    assert scaled_size((640, 480), (768, 768)) == (768, 576)
    assert unpad((640, 480), (54, 54)) == Box(top=7, left=0, height=40, width=54)
    assert capped(108, 108, 9 * 27**2) == (81, 81)
    assert capped(88, 88, 9 * 27**2) == (88, 88)


def test_best_resolution_and_scaled_size_are_the_reference_s():
    from ..reference import torchvision_shim

    torchvision_shim.install()
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

    for width, height in SIZES:
        target = best_resolution((width, height), GRID)
        assert target == select_best_resolution((height, width), [(h, w) for w, h in GRID])[::-1]
        row = np.broadcast_to(np.uint8(0), (height, width, 3))
        want = get_patch_output_size(row, target[::-1], "channels_last")
        assert scaled_size((width, height), target) == want[::-1]


def test_of_equal_resolutions_the_one_with_least_to_pad():
    assert best_resolution((100, 60), GRID) == (384, 384)
    assert best_resolution((384, 100), [(384, 768), (768, 384), (384, 384)]) == (384, 384)
    assert best_resolution((500, 500), [(768, 384), (384, 768)]) == (768, 384), "the first of two"


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 130), (90, 400), (384, 384)])
def test_unpad_leaves_what_the_padding_did_not_cover(size):
    """A picture of ones, fitted and padded with zeros, by the features' share of it."""
    target = best_resolution(size, GRID)
    rows, columns = target[1] // 384 * 27, target[0] // 384 * 27
    (across, down), box = scaled_size(size, target), unpad(size, (rows, columns))
    assert abs(box.width - across / target[0] * columns) < 2
    assert abs(box.height - down / target[1] * rows) < 2
    assert box.top * 2 + box.height == rows
    assert box.left * 2 + box.width == columns


def test_unpad_counts_in_whole_numbers():
    """Where floats come out a hair too low: 270 * 624 / 1872 is 90, in floats 89.99999999999999."""
    size, grid = (1872, 624), (54, 135)
    assert int(624 * (135 / 1872)) == 44 != 135 * 624 // 1872
    assert unpad(size, grid) == Box(top=4, left=0, height=46, width=135)


def test_capped_is_the_reference_s_float_arithmetic():
    for height in range(1, 163, 7):
        for width in range(1, 163, 5):
            ratio = math.sqrt(height * width / 6561)
            small = (height, width) if ratio <= 1.1 else (int(height // ratio), int(width // ratio))
            assert capped(height, width, 6561) == small


def test_cut_goes_row_by_row():
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    tiles = cut(picture, 2)
    assert tiles.shape == (6, 2, 2, 3)
    assert np.array_equal(tiles[0], picture[:2, :2])
    assert np.array_equal(tiles[1], picture[:2, 2:4])
    assert np.array_equal(tiles[3], picture[2:, :2])


def test_tiles_are_the_original_s():
    """Step by step as llava/mm_utils.py does it, with Pillow alone."""
    noise = np.random.default_rng(0).integers(0, 256, (110, 201, 3), np.uint8)
    image = Image.fromarray(noise)
    tiles = anyres_tiles(image, 64, [(64 * i, 64 * j) for i in range(1, 5) for j in range(1, 5)])
    assert tiles.shape == (1 + 4 * 2, 64, 64, 3)
    assert np.array_equal(tiles[0], image.resize((64, 64)))
    canvas = Image.new("RGB", (256, 128), (0, 0, 0))
    scaled = image.resize((math.ceil(201 * (128 / 110)), 128))
    canvas.paste(scaled, ((256 - scaled.width) // 2, 0))
    for index in range(8):
        row, column = divmod(index, 4)
        box = (64 * column, 64 * row, 64 * column + 64, 64 * row + 64)
        assert np.array_equal(tiles[1 + index], canvas.crop(box))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 2000)])
def test_an_elongated_image_still_has_tiles(size):
    tiles = anyres_tiles(Image.new("RGB", size, "white"), 384, GRID)
    assert len(tiles) >= 2
    assert tiles[1:].max() == 255
