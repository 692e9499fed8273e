"""The shuffle against its definition, and the order of what it makes."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge.connectors.pixel_shuffle import PixelShuffle, pixel_shuffle

from ..parity import FLOAT32, distance


@pytest.mark.parametrize(("grid", "scale"), [(4, 2), (6, 2), (9, 3), (8, 4), (4, 1)])
def test_every_value_is_where_the_definition_puts_it(grid, scale):
    x = np.random.default_rng(grid).normal(size=(2, grid * grid, 3)).astype(np.float32)
    side, square = grid // scale, x.reshape(2, grid, grid, 3)
    want = np.zeros((2, side, side, scale * scale * 3), np.float32)
    for i, j, dh, dw in np.ndindex(side, side, scale, scale):
        start = (dh * scale + dw) * 3
        want[:, i, j, start : start + 3] = square[:, i * scale + dh, j * scale + dw]
    assert np.array_equal(pixel_shuffle(mx.array(x), scale), want.reshape(2, side * side, -1))


def test_the_worked_example():
    x = mx.arange(16)[None, :, None]
    assert pixel_shuffle(x, 2)[0, :2].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_the_connector_is_the_shuffle_and_one_matmul():
    connector = PixelShuffle(8, 16, 2)
    assert set(connector.parameters()["proj"]) == {"weight"}
    x = mx.random.normal((3, 16, 8), key=mx.random.key(1))
    want = np.array(pixel_shuffle(x, 2)) @ np.array(connector.proj.weight).T
    assert distance(connector(x), want) < FLOAT32
