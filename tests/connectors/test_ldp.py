"""LDP and LDPv2 against the same networks in torch, their sizes, and their graph on NHWC."""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge import kernels
from mlx_vlm_edge.connectors import ldp
from mlx_vlm_edge.connectors.ldp import LDP, POOLED, InvertedResidual, LDPv2
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models import mobilevlm

from ..parity import FLOAT32, distance
from ..reference import ldp as theirs
from ..reference import torchvision_shim

FEATURES, WIDTH = 48, 32
OURS = {"ldpnet": LDP, "ldpnetv2": LDPv2}


def ours_from(reference, kind):
    """Our connector with the weights of torch's, by the published names."""
    model = OURS[kind](FEATURES, WIDTH)
    weights = {}
    for name, tensor in reference.state_dict().items():
        array = mx.array(tensor.float().numpy())
        array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
        target = mobilevlm.rename(f"mm_projector.{name}").removeprefix("mm_projector.")
        if array.ndim == 4 and array.shape[1] == 1:
            array = array.reshape(array.shape[0], -1)
        weights[target] = array
    model.load_weights(list(weights.items()), strict=True)
    return model


@pytest.fixture(scope="module", params=["ldpnet", "ldpnetv2"])
def pair(request):
    """torch's connector in float64 and ours."""
    reference = theirs.build(request.param, FEATURES, WIDTH)
    return ours_from(reference, request.param), reference


def features(side, seed=0):
    return np.random.default_rng(seed).normal(size=(2, side * side, FEATURES)) * 2


@pytest.mark.parametrize("side", [24, 12, 13, 27, 32, 7])
def test_same_as_torch_on_any_grid(pair, side):
    ours, reference = pair
    x = features(side)
    want = theirs.run(reference, x)
    assert want.shape[1] == (POOLED**2 if isinstance(ours, LDPv2) else (-(-side // 2)) ** 2)
    assert distance(ours(mx.array(x, dtype=mx.float32)), want) < FLOAT32


def test_the_gate_s_width_is_torchvisions():
    """Of the published widths a quarter is a multiple of 8 already."""
    torchvision_shim.install()
    from torchvision.models._utils import _make_divisible

    for width in range(4, 300, 4):
        assert LDP(8, width).blocks[0].reduce.weight.shape == (
            _make_divisible(width // 4, 8),
            width,
        )


def test_a_grid_that_is_no_square_is_refused(pair):
    with pytest.raises(UsageError, match="no square"):
        pair[0](mx.zeros((1, 23, FEATURES)))


@pytest.mark.parametrize(("size", "out"), [(24, 12), (27, 12), (13, 12), (7, 12), (3, 2)])
def test_pooling_windows_are_torchs(size, out):
    import torch

    x = np.random.default_rng(1).normal(size=(1, size, size, 5)).astype(np.float32)
    want = torch.nn.AdaptiveAvgPool2d(out)(torch.from_numpy(x).permute(0, 3, 1, 2))
    got = ldp.adaptive_average_pool(mx.array(x), out)
    assert distance(got, want.permute(0, 2, 3, 1).numpy()) < FLOAT32


FAULTS = {
    "pooled after the convolution": ("ldpnetv2", "pool last"),
    "no residual in LDPv2": ("ldpnetv2", "no residual"),
    "columns before rows": ("both", "transposed"),
    "tanh GELU": ("both", "gelu"),
    "residual around the block of stride 2 only": ("ldpnet", "strides"),
    "sigmoid for the hard sigmoid": ("ldpnet", "gate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(pair, monkeypatch, fault):
    ours, reference = pair
    kind, how = FAULTS[fault]
    if kind not in ("both", "ldpnetv2" if isinstance(ours, LDPv2) else "ldpnet"):
        pytest.skip("not a part of this connector")
    plant(monkeypatch, how)
    x = features(24)
    got = ours(mx.array(x, dtype=mx.float32))
    assert distance(got, theirs.run(reference, x)) > 3 * FLOAT32


def plant(monkeypatch, how):
    pool, grid, deep = ldp.adaptive_average_pool, ldp.to_grid, ldp.depthwise_conv2d

    def tanh_gelu(x):
        return 0.5 * x * (1 + mx.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def residual_last(self, x):
        first, _, second = self.mlp.layers
        x = grid(second(ldp.gelu(first(x))))
        x = x + ldp.depthwise_conv2d(x, [self.peg], self.peg_bias)
        return pool(x, POOLED).flatten(1, 2)

    def wrong_gate(self, x):
        y = ldp.depthwise_conv2d(x, [self.depthwise], None, self.stride)
        y = ldp.hard_swish(self.norm1(y))
        gate = self.expand(mx.maximum(self.reduce(y.mean(axis=(1, 2), keepdims=True)), 0))
        y = self.norm2(self.pointwise(y * mx.sigmoid(gate)))
        return x + y if self.stride == 1 else y

    target, replacement = {
        "pool last": ("LDPv2.__call__", residual_last),
        "no residual": (
            "depthwise_conv2d",
            lambda x, *others: deep(x, *others) - x,
        ),
        "transposed": ("to_grid", lambda x: grid(x).swapaxes(1, 2)),
        "gelu": ("gelu", tanh_gelu),
        "strides": (
            "InvertedResidual.__call__",
            lambda self, x, real=InvertedResidual.__call__: (
                real(self, x) - x if self.stride == 1 else real(self, x)
            ),
        ),
        "gate": ("InvertedResidual.__call__", wrong_gate),
    }[how]
    monkeypatch.setattr(f"mlx_vlm_edge.connectors.ldp.{target}", replacement)
    if how == "gelu":
        monkeypatch.setattr("mlx_vlm_edge.connectors.mlp.gelu", tanh_gelu)


@pytest.mark.parametrize(
    ("kind", "width", "total", "outside_the_mlp"),
    [
        (LDPv2, 2048, 6_316_032, 20_480),
        (LDPv2, 2560, 9_205_760, 25_600),
        (LDPv2, 4096, 21_020_672, 40_960),
        (LDP, 2048, 18_936_832, 12_641_280),
        (LDP, 2560, 28_913_920, 19_733_760),
    ],
)
def test_parameter_counts(kind, width, total, outside_the_mlp):
    """630x fewer parameters, as the V2 paper says, is 12,641,280 to 20,480: without the MLP that
    both have. Whole, 18,936,832 to 6,316,032 is 3.0x."""
    model = kind(1024, width)
    sizes = {name: array.size for name, array in tree_flatten(model.parameters())}
    assert sum(sizes.values()) == total
    assert sum(n for name, n in sizes.items() if not name.startswith("mlp.")) == outside_the_mlp


def operations(x, tmp_path):
    """How often each primitive is in the graph of `x`."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), x)
    found: dict[str, int] = {}
    for name in re.findall(r'label ?="(\w+)', path.read_text()):
        found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize("kind", [LDP, LDPv2])
def test_nothing_changes_its_layout(kind, tmp_path, monkeypatch):
    """On GPUs the only transposes are the linear layers' of their weights, which move nothing."""
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    model = kind(FEATURES, WIDTH)
    linear = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    x = mx.array(features(24), dtype=mx.float32)
    mx.eval(x, model.parameters())
    found = operations(model(x), tmp_path)
    assert found["Convolution"] == (2 if kind is LDP else 1)
    assert found["Transpose"] == linear
    assert not found.keys() & {"Contiguous", "Copy", "Gather", "Pad"}
