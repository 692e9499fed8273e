"""Reading safetensors: headers that lie, shards that contradict, and handing arrays out once."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_vlm_edge.checkpoint.weights import (
    Weights,
    check_finite,
    check_names,
    read_header,
    read_safetensors,
)
from mlx_vlm_edge.errors import UsageError

FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path, header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_names_types_shapes_and_bytes(path):
    save_file({"a": np.ones((2, 3), np.float16), "b": np.ones(5, np.int8)}, path, {"x": "y"})
    header = read_header(path)
    assert {name: (i.dtype, i.shape, i.nbytes) for name, i in header.items()} == {
        "a": ("F16", (2, 3), 12),
        "b": ("I8", (5,), 5),
    }


@pytest.mark.parametrize(
    "entry",
    [
        5,
        None,
        {"shape": [1], "data_offsets": [0, 4]},
        FOUR | {"shape": "ab"},
        FOUR | {"shape": [-1, -1]},
        FOUR | {"shape": [1.5]},
        FOUR | {"data_offsets": [0, 4, 8]},
        FOUR | {"data_offsets": [-4, 0]},
        FOUR | {"data_offsets": [0, 8]},
        FOUR | {"data_offsets": [8, 12]},
        FOUR | {"shape": [2**40, 2**40], "data_offsets": [0, 2**82]},
        FOUR | {"dtype": "F8_E4M3"},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be(path, entry):
    with pytest.raises(UsageError, match=r"model\.safetensors: (.*weight|truncated)"):
        read_header(write(path, {"weight": entry}))


@pytest.mark.parametrize("header", [[1], "text", 3, b"{", b"\xff\xff", b""])
def test_a_header_that_cannot_be(path, header):
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        read_header(write(path, header))


def test_metadata_that_cannot_be(path):
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        read_safetensors([write(path, {"__metadata__": 5, "a": FOUR})])


def test_a_file_that_is_much_shorter_than_it_says(path):
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(UsageError, match="not a complete"):
        read_header(path)


def test_a_weight_in_two_shards(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for each in paths:
        save_file({"w": np.ones(2, np.float32)}, each)
    with pytest.raises(UsageError, match="w is in another shard"):
        read_safetensors(paths)


def test_arrays_are_handed_out_once():
    weights = Weights({"a": mx.ones((2, 3)), "b": mx.ones(1), "c.x": mx.ones(1), "d": mx.ones(1)})
    assert weights.take("a", 2, 3).shape == (2, 3)
    for wrong in (lambda: weights.take("a", 2, 3), lambda: weights.take("b", 2)):
        with pytest.raises(UsageError):
            wrong()
    weights.drop("d")
    weights.drop("not there")
    assert list(weights.take_prefix("c.")) == ["c.x"]
    weights.finish()
    with pytest.raises(UsageError, match="e"):
        Weights({"e": mx.ones(1)}).finish()


def test_names_are_compared_both_ways():
    expected = {"a": (2,), "b": (3,)}
    check_names(expected, {"a": mx.ones(2), "b": mx.ones(3)})
    for weights, message in (
        ({"a": mx.ones(2)}, "lacks b"),
        ({"a": mx.ones(2), "b": mx.ones(3), "c": mx.ones(1)}, "c"),
        ({"a": mx.ones(2), "b": mx.ones(4)}, "b is"),
    ):
        with pytest.raises(UsageError, match=message):
            check_names(expected, weights)


def test_values_that_are_not_finite_are_named():
    good = {"a": mx.ones(3), "b": mx.array([1, 2]), "empty": mx.zeros(0)}
    check_finite(good)
    check_finite({"b": mx.array([1, 2])})
    for value in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="norm has values that are not finite"):
            check_finite({**good, "norm": mx.array([1.0, value], mx.bfloat16)})


def test_whole_numbers_are_handed_out_where_a_layer_is_quantised_alone():
    packed = mx.zeros((2, 4), mx.uint32)
    weights = Weights({"a.weight": packed, "a.scales": mx.ones((2, 1)), "b.weight": packed})
    assert set(weights.take_prefix("a.")) == {"a.weight", "a.scales"}
    with pytest.raises(UsageError, match=r"b\.weight holds uint32"):
        weights.take("b.weight", 2, 4)
