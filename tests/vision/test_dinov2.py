"""DINOv2 against transformers' own, both kinds of MLP; its position embedding against torch's."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vlm_edge import kernels
from mlx_vlm_edge.checkpoint.weights import Weights
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.vision import dinov2
from mlx_vlm_edge.vision.dinov2 import Dinov2, Dinov2Config, fold, resized_positions

from ..parity import FLOAT32, distance
from ..reference import dinov2 as theirs

PREFIX = "vision_tower."


@pytest.fixture(scope="module", params=[False, True], ids=["mlp", "swiglu"])
def original(request):
    return theirs.build(request.param)


def ours(original, **changes):
    model, config = original
    parsed = Dinov2Config.from_dict(config | changes)
    weights = Weights({PREFIX + k: mx.array(v) for k, v in theirs.weights(model).items()})
    tower = Dinov2(parsed)
    folded = fold(weights, PREFIX, parsed)
    weights.finish()
    expected = {name: p.shape for name, p in tree_flatten(tower.parameters())}
    assert expected == {name: array.shape for name, array in folded.items()}
    tower.update(tree_unflatten(list(folded.items())))
    return tower


def test_it_is_transformers(original):
    x = theirs.pixels(1, 56, 2)
    tower, want = ours(original), theirs.last(original[0], x)
    assert distance(tower(mx.array(x)), want) < FLOAT32
    with kernels.plain():
        assert distance(tower(mx.array(x)), want) < FLOAT32


def test_a_rest_that_fills_no_patch_is_not_seen(original):
    x = theirs.pixels(1, 60)
    tower = ours(original, input_size=60)
    assert mx.array_equal(tower(mx.array(x)), tower(mx.array(x[:, :56, :56])))


FAULTS = {
    "no class token": lambda tower: setattr(tower, "class_embedding", mx.zeros((48,))),
    "a layer less": lambda tower: tower.layers.pop(),
    "two layers changed": lambda tower: tower.layers.reverse(),
    "eps": lambda tower: setattr(tower.layers[1].norm2, "eps", 1e-2),
    "no positions": lambda tower: setattr(tower, "position_embedding", mx.zeros((17, 48))),
}


@pytest.mark.parametrize("fault", [*FAULTS, "no layer scale", "gate and up changed", "tanh GELU"])
def test_a_fault_is_caught(fault, monkeypatch):
    gated = fault != "tanh GELU"
    original, real = theirs.build(gated), dinov2.swiglu
    if fault == "tanh GELU":
        monkeypatch.setattr(dinov2, "gelu", kernels.gelu_tanh)
    if fault == "gate and up changed":
        monkeypatch.setattr(dinov2, "swiglu", lambda gate, up: real(up, gate))
    if fault == "no layer scale":
        monkeypatch.setattr(
            dinov2, "_scaled", lambda weights, source, target, shape, scale: (
                weights.drop(scale) or weights.pair(source, target, *shape)
            )
        )  # fmt: skip
    tower = ours(original)
    if fault in FAULTS:
        FAULTS[fault](tower)
    x = theirs.pixels(1, 56)
    assert distance(tower(mx.array(x)), theirs.last(original[0], x)) > 3 * FLOAT32


@pytest.mark.parametrize(("side", "grid"), [(37, 27), (9, 7), (5, 8), (4, 4)])
def test_positions_are_resized_as_torch_does(side, grid):
    table = np.random.default_rng(side).normal(size=(1 + side * side, 6)).astype(np.float32)
    got = resized_positions(mx.array(table), grid)
    assert (
        distance(got, theirs.resized(table, grid) if side != grid else table) < 5e-6
    )  # torch places samples in float32


def test_the_small_offset_of_the_grid_matters(monkeypatch):
    """Newer releases of transformers resize without it."""
    table = np.random.default_rng(0).normal(size=(1 + 37 * 37, 6)).astype(np.float32)
    monkeypatch.setattr(dinov2, "GRID_OFFSET", 0.0)
    assert distance(resized_positions(mx.array(table), 27), theirs.resized(table, 27)) > 1e-2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"num_register_tokens": 4}, "num_register_tokens"),
        ({"num_attention_heads": 5}, "no multiple"),
        ({"num_hidden_layers": 0}, "not above zero"),
        ({"input_size": 13}, "less than a patch"),
    ],
)
def test_what_cannot_be_is_one_line(changes, says):
    with pytest.raises(UsageError, match=says):
        Dinov2Config.from_dict({**theirs.GEOMETRY, **changes})


def test_what_a_config_lacks_is_named():
    with pytest.raises(UsageError, match="lacks 'hidden_size'"):
        Dinov2Config.from_dict({})
