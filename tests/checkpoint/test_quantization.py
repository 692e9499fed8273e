"""How an array is quantised stands in its shapes; the config's block gives what they leave open."""

import mlx.core as mx
import pytest

from mlx_vlm_edge.checkpoint.quantization import Form, dequantized, form
from mlx_vlm_edge.errors import UsageError

PATH = "language_model.model.layers.0.mlp.down_proj"
BLOCK = {"group_size": 64, "bits": 4}


def packed(bits, group_size):
    return mx.quantize(mx.random.normal((8, 128), key=mx.random.key(1)), group_size, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_built_layer_needs_no_entry(bits, group_size):
    weight, scales, _ = packed(bits, group_size)
    assert form(BLOCK, PATH, weight, scales, 128) == Form(group_size, bits, "affine")


@pytest.mark.parametrize("name", [PATH, PATH.removeprefix("language_model.")])
def test_an_entry_gives_the_group_size_of_a_layer_that_is_not_built(name):
    weight, scales, biases = packed(8, 32)
    block = {**BLOCK, name: {"group_size": 32}}
    assert form(block, PATH, weight, scales) == Form(32, 8, "affine")
    plain = dequantized({f"{PATH}.weight": weight, f"{PATH}.scales": scales,
                         f"{PATH}.biases": biases, f"{PATH}.bias": scales[0]}, block)  # fmt: skip
    want = mx.dequantize(weight, scales, biases, 32, 8)
    assert plain.keys() == {f"{PATH}.weight", f"{PATH}.bias"}
    assert mx.array_equal(plain[f"{PATH}.weight"], want)


def test_another_mode():
    name = PATH
    weight, scales = mx.quantize(mx.ones((8, 128)), 32, 4, mode="mxfp4")
    block = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    arrays = {f"{name}.weight": weight, f"{name}.scales": scales}
    assert mx.array_equal(dequantized(arrays, block)[f"{name}.weight"], mx.ones((8, 128)))
    with pytest.raises(UsageError, match="as affine of 4 bits"):
        dequantized(arrays, {**block, "mode": "affine"})


@pytest.mark.parametrize("size", [None, 0, -64, "64", 63, True])
def test_blocks_that_fit_no_shape(size):
    weight, scales, biases = packed(4, 64)
    arrays = {f"{PATH}.weight": weight, f"{PATH}.scales": scales, f"{PATH}.biases": biases}
    with pytest.raises(UsageError, match="no quantisation"):
        dequantized(arrays, {"group_size": size, "bits": 4})
    with pytest.raises(UsageError, match="no quantization block"):
        dequantized(arrays, None)
    with pytest.raises(UsageError, match=r"no .*weight"):
        dequantized({f"{PATH}.scales": scales}, BLOCK)
