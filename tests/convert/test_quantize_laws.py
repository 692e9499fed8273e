"""Laws of quantising: how far a weight may move, and that a second time moves nothing."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_vlm_edge_convert.quantize import quantize

from mlx_vlm_edge.checkpoint.quantization import dequantized
from mlx_vlm_edge.kernels.quantized import BITS, Linear, turned

NAME = "language_model.model.layers.0.mlp.up_proj.weight"
laws = settings(max_examples=60, deadline=None, derandomize=True)
SEED = st.integers(0, 2**32 - 1)


def matrix(rows, columns, seed, scale=1.0):
    random = np.random.default_rng(seed)
    return mx.array((random.normal(size=(rows, columns)) * scale).astype(np.float32))


@laws
@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 5),
    st.integers(1, 3), st.floats(1e-3, 1e3), SEED,
)  # fmt: skip
def test_no_weight_moves_further_than_a_step(bits, group, rows, groups, scale, seed):
    """Half a step, but at the ends of a group: MLX moves one of them so that zero stays zero."""
    weight = matrix(rows, group * groups, seed, scale)
    packed, block = quantize({NAME: weight}, bits, group)
    assert block["bits"] == bits
    back = dequantized(packed, block)
    assert back.keys() == {NAME}
    steps = np.abs(np.array(packed[NAME.replace("weight", "scales")])).repeat(group, axis=1)
    off = np.abs(np.array(back[NAME]) - np.array(weight))
    assert (off <= 1.001 * steps + 1e-6 * scale).all()
    assert (off <= 0.501 * steps + 1e-6 * scale).mean() >= 1 - 4 / group


@laws
@given(st.sampled_from([4, 8]), st.integers(1, 4), SEED)
def test_what_is_constant_in_a_group_stays(bits, rows, seed):
    values = np.random.default_rng(seed).normal(size=(rows, 2)).astype(np.float32)
    weight = mx.array(values.repeat(64, axis=1))
    back = dequantized(*quantize({NAME: weight}, bits, 64))[NAME]
    assert np.allclose(np.array(back), np.array(weight), rtol=1e-5, atol=1e-6)


@laws
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 4), SEED)
def test_turned_words_hold_the_same_numbers(bits, rows, words, seed):
    """Place p of word i of an input's row is output i + p N / n."""
    count = 32 // bits
    N, K = rows * count, words * count
    values = np.random.default_rng(seed).integers(0, 2**bits, (N, K)).astype(np.uint64)

    def packed(numbers):
        shifts = np.arange(count, dtype=np.uint64) * np.uint64(bits)
        return (numbers << shifts).sum(axis=-1).astype(np.uint32)

    given_words = mx.array(packed(values.reshape(N, words, count)))
    wanted = packed(values.T.reshape(K, count, rows).swapaxes(1, 2))
    assert np.array_equal(np.array(turned(given_words, bits)), wanted)


@settings(laws, max_examples=30)
@given(
    st.sampled_from(BITS), st.sampled_from([32, 64]), st.integers(1, 4), st.integers(1, 3),
    st.integers(1, 14), SEED,
)  # fmt: skip
def test_the_cpu_s_layer_is_its_unpacked_matrix(bits, group, blocks, groups, rows, seed):
    plain = nn.Linear(group * groups, 32 * blocks, bias=True)
    plain.weight = matrix(32 * blocks, group * groups, seed)
    layer = nn.QuantizedLinear.from_linear(plain, group, bits)
    parts = layer.weight, layer.scales, layer.biases
    unpacked = np.array(mx.dequantize(*parts, group_size=group, bits=bits), dtype=np.float64)
    x = matrix(rows, group * groups, seed + 1)
    wanted = np.array(x, dtype=np.float64) @ unpacked.T + np.array(plain.bias)
    got = np.array(Linear(layer)(x))
    assert np.abs(got - wanted).max() <= 2e-5 * max(1.0, np.abs(wanted).max())
