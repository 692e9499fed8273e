"""Weights on their way into a package: MLX's groups as they are, palettes, what cannot be held."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.emit.matrices import (
    Dense,
    Groups,
    groups,
    matrix,
    original,
    packed,
    unpacked,
)
from mlx_vlm_edge_convert.coreml.emit.palettes import palette
from mlx_vlm_edge_convert.coreml.parts.decoder_reference import Product

from mlx_vlm_edge.errors import UsageError

RNG = np.random.default_rng(3)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32) * 0.05


# What each matrix is planted with, and whether its offsets are whole numbers in range.
PLANTED = {
    "normal": (normal(32, 128), True),
    "heavy tails": ((RNG.standard_t(2, (32, 128)) * 0.02).astype(np.float32), True),
    "one sign": (np.abs(normal(32, 128)) + 1, False),
    "the other sign": (-np.abs(normal(32, 128)) - 1, False),
    "rows of zeros": (np.where(np.arange(32)[:, None] % 3, normal(32, 128), 0), True),
    "rows of one value": (np.where(np.arange(32)[:, None] % 3, normal(32, 128), 0.25), True),
    "rows of one negative value": (np.where(np.arange(32)[:, None] % 3, normal(32, 128), -3), True),
}


def quantised(weight, bits, group=64, dtype=mx.float32):
    parts = mx.quantize(mx.array(weight.astype(np.float32)).astype(dtype), group, bits)
    dense = mx.dequantize(parts[0], *(p.astype(mx.float32) for p in parts[1:]), group, bits)
    return np.array(parts[0]), *(np.array(p.astype(mx.float32)) for p in parts[1:]), np.array(dense)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", PLANTED)
def test_groups_stand_for_mlx_s_own_weights(name, bits):
    weight, whole = PLANTED[name]
    *parts, dense = quantised(weight, bits)
    found = groups(*parts, bits)
    assert np.abs(found.dense() - dense).max() <= 2e-6 * np.abs(dense).max()
    assert found.whole == whole
    assert (found.scale >= 0).all() or name == "rows of one negative value"


def test_no_weight_is_quantised_again():
    *parts, _ = quantised(PLANTED["normal"][0], 4)
    theirs, found = unpacked(parts[0], 4), groups(*parts, 4)
    negative = np.repeat(parts[1] < 0, 64, axis=1)
    assert 0.2 < negative.mean() < 0.8  # the case is there
    np.testing.assert_array_equal(found.data, np.where(negative, 15 - theirs, theirs))


def test_bfloat16_scales_keep_their_offsets():
    """Rounded to bfloat16, a bias is no whole number of scales: it must not be made one."""
    *parts, dense = quantised(PLANTED["normal"][0], 8, dtype=mx.bfloat16)
    found = groups(*parts, 8)
    assert not found.whole
    assert np.abs(found.dense() - dense).max() <= np.abs(parts[1]).max() / 50


@pytest.mark.parametrize("name", PLANTED)
def test_a_bfloat16_matrix_is_quantised_from_float32(name):
    weight, whole = PLANTED[name]
    layer = nn.Linear(128, 32)
    layer.weight = mx.array(weight.astype(np.float32)).astype(mx.bfloat16)
    for bits in (4, 8):
        found = matrix(layer, bits, half=True).weight
        assert (found.whole, found.moved) == (whole, False)
        true = original(layer, bits)
        assert np.linalg.norm(found.dense() - true) < 1e-3 * np.linalg.norm(true)


@pytest.mark.parametrize(
    ("dtype", "bits", "whole"),
    [(mx.bfloat16, 4, True), (mx.bfloat16, 8, False), (mx.float16, 4, True), (mx.float16, 8, True)],
)
def test_offsets_that_half_precision_rounded(dtype, bits, whole):
    """Back on integers where these can be known, all of a matrix or none."""
    for name in ("normal", "heavy tails"):
        weight = PLANTED[name][0]
        layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 32), 32, bits)
        layer.weight, layer.scales, layer.biases = mx.quantize(
            mx.array(weight).astype(dtype), 32, bits
        )
        found, true = matrix(layer, None, half=False).weight, original(layer, None)
        assert (found.whole, found.moved) == (whole, whole)
        own = (found.offset == np.round(found.offset)).mean()
        assert own == 1 if whole else own < 0.5
        assert np.linalg.norm(found.dense() - true) < 1e-2 * np.linalg.norm(true)


def test_one_group_of_one_sign_leaves_all_offsets_as_they_are():
    weight = PLANTED["normal"][0].copy()
    weight[3, :32] = np.abs(weight[3, :32]) + 1
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 32), 32, 4)
    layer.weight, layer.scales, layer.biases = mx.quantize(
        mx.array(weight).astype(mx.bfloat16), 32, 4
    )
    found, true = matrix(layer, None, half=False).weight, original(layer, None)
    assert (found.whole, found.moved) == (False, False)
    assert np.abs(found.dense() - true).max() < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_there_and_back(bits):
    packed_by_mlx = quantised(normal(8, 64), bits)[0]
    np.testing.assert_array_equal(packed(unpacked(packed_by_mlx, bits), bits), packed_by_mlx)


@pytest.mark.parametrize("bits", [4, 8, "palette4", None])
def test_the_product_for_comparison_has_the_package_s_weights(bits):
    layer = nn.Linear(128, 32)
    found = matrix(layer, bits, half=True)
    x = mx.array(normal(4, 128))
    own = np.array(x) @ found.weight.dense().T + found.bias
    assert np.abs(np.array(Product(found)(x)) - own).max() < 1e-5
    limit = 0.2 if bits == "palette4" else 1e-3
    true = original(layer, bits)
    assert np.linalg.norm(found.weight.dense() - true) < limit * np.linalg.norm(true)


def test_a_quantised_layer_goes_as_it_is():
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 32), 32, 4)
    found = matrix(layer, None, half=False).weight
    assert isinstance(found, Groups)
    assert found.scale.shape == (32, 4)
    assert np.abs(found.dense() - original(layer, None)).max() < 1e-6


@pytest.mark.parametrize(
    ("layer", "bits", "says"),
    [
        (nn.QuantizedLinear(128, 32, bits=3), None, "3-bit weights of mode affine have no Core ML"),
        (nn.QuantizedLinear(128, 32, bits=4), 8, "its weights have 4 bits already"),
        (nn.Linear(48, 32), 4, "a matrix of 48 inputs has no groups of 64 or 32"),
    ],
)
def test_what_cannot_be_held_is_one_clear_line(layer, bits, says):
    with pytest.raises(UsageError, match=says):
        matrix(layer, bits, half=True)


def test_weights_beyond_float16_are_refused():
    layer = nn.Linear(64, 32)
    layer.weight = layer.weight * 1e7
    with pytest.raises(UsageError, match=r"does not fit in float16: use --precision fp32"):
        matrix(layer, None, half=True)
    assert isinstance(matrix(layer, None, half=False).weight, Dense)


@pytest.mark.parametrize("bits", [4, 6])
def test_a_palette_of_few_values_is_exact(bits):
    count = 1 << bits
    values = np.sort(normal(count))
    weight = values[RNG.integers(0, count, (32, 128))]
    weight[:, :count] = values  # all of them in every row
    packed = palette(weight, bits)
    assert np.abs(packed.dense() - weight).max() < 1e-6
    assert packed.rows(slice(16, 32)).dense().tolist() == packed.dense()[16:].tolist()


@pytest.mark.parametrize("bits", [4, 6])
def test_a_palette_is_nearer_than_even_steps(bits):
    weight = normal(32, 256)
    error = np.square(palette(weight, bits).dense() - weight).mean()
    low, high = weight.min(), weight.max()
    step = (high - low) / ((1 << bits) - 1)
    even = np.square(np.round((weight - low) / step) * step + low - weight).mean()
    assert error < 0.6 * even
