"""Quantised weights are those of mlx.nn.quantize; only the language model is touched."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert, to_native
from mlx_vlm_edge_convert.quantize import cast, quantize

from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.checkpoint.quantization import dequantized
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.load import read_checkpoint


@pytest.fixture
def weights(apple):
    return to_native(apple, read_config(apple))[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_arrays_are_those_of_mlx_nn_quantize(bits):
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(20, 64)
            self.proj = nn.Linear(64, 32, bias=True)
            self.norm = nn.RMSNorm(64)

    part = Part()
    plain = {f"language_model.{k}": v for k, v in tree_flatten(part.parameters())}
    connector = {"mm_projector.0.weight": mx.ones((4, 64)), "mm_projector.0.bias": mx.ones((4,))}
    got, block = quantize(plain | connector, bits, 32)
    nn.quantize(part, group_size=32, bits=bits)
    want = {f"language_model.{k}": v for k, v in tree_flatten(part.parameters())}
    assert set(got) == set(want | connector)
    for name, array in want.items():
        assert mx.array_equal(got[name], array), name
    assert block == {
        "group_size": 32,
        "bits": bits,
        "mode": "affine",
        "mm_projector.0": False,
    }


def test_only_the_language_model_is_quantised(weights):
    packed, _ = quantize(weights, 4, 32)
    scaled = {name for name in packed if name.endswith(".scales")}
    assert len(scaled) == 2 + 2 * 7  # embedding and head, seven matrices in each of two layers
    assert all(name.startswith("language_model.") for name in scaled)
    for name, array in weights.items():
        if not name.startswith("language_model."):
            assert packed[name] is array


@pytest.mark.parametrize(
    ("bits", "group", "said"),
    [
        (4, 128, r"64 wide, which groups of 128 do not divide; use --group-size 32 or 64"),
        (7, 64, "7 bits"),
        (4, 48, "groups of 48"),
    ],
)
def test_what_cannot_be_quantised_is_said(bits, group, said, weights):
    with pytest.raises(UsageError, match=said):
        quantize(weights, bits, group)


def test_dequantising_gives_what_the_packed_weights_mean(weights):
    packed, block = quantize(weights, 8, 32)
    plain = dequantized(packed, block)
    assert set(plain) == set(weights)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert mx.allclose(plain[name], weights[name], atol=1e-2)
    mixed = {"group_size": 64, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 8}}
    mixed["model.layers.0.mlp.up_proj"]["group_size"] = 32
    one = {k: v for k, v in packed.items() if k.startswith(name.removesuffix("weight"))}
    assert mx.array_equal(dequantized(one, mixed)[name], plain[name])
    with pytest.raises(UsageError, match="mxfp4"):
        dequantized(one, {**block, "mode": "mxfp4"})


def test_casting(weights):
    half = cast(weights, "bfloat16")
    assert {array.dtype for array in half.values()} == {mx.bfloat16}
    half = cast(weights, "float16")
    for name, array in half.items():
        kept = name.startswith("vision_tower.")  # FastViTHD overflows float16
        assert array.dtype == (mx.float32 if kept else mx.float16), name
    packed, _ = quantize(cast(weights, "bfloat16"), 4, 32)
    recast = cast(packed, "float32")
    assert {array.dtype for array in recast.values()} == {mx.float32, mx.uint32}
    with pytest.raises(UsageError, match="int8"):
        cast(weights, "int8")


def test_a_quantised_folder_can_be_quantised_again(apple, tmp_path):
    eight, four = tmp_path / "eight", tmp_path / "four"
    convert(apple, eight, bits=8, group_size=32)
    convert(eight, four, bits=4, group_size=32, dtype="bfloat16", verify=True)
    config, weights = read_checkpoint(four)
    assert config["quantization"] == config["quantization_config"]
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 32)
    name = "language_model.model.embed_tokens"
    assert weights[f"{name}.weight"].shape == (320, 64 * 4 // 32)
    assert weights[f"{name}.scales"].dtype == mx.bfloat16
    assert json.loads((four / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_dtype_change_leaves_packed_weights_alone(apple, tmp_path):
    eight, half = tmp_path / "eight", tmp_path / "half"
    convert(apple, eight, bits=8, group_size=32)
    convert(eight, half, dtype="bfloat16")
    before, after = read_checkpoint(eight)[1], read_checkpoint(half)[1]
    name = "language_model.model.embed_tokens.weight"
    assert mx.array_equal(before[name], after[name])
    assert after["mm_projector.0.weight"].dtype == mx.bfloat16
