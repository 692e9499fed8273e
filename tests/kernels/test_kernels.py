"""Every form of every kernel against torch in float64, on whatever device the tests run."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_vlm_edge import kernels
from mlx_vlm_edge.kernels import cpu, gpu

from ..parity import distance

EQUAL = 1e-6  # how far any form may be from the truth, and so twice this from another
X = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * 3
Y = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32) * 3


@pytest.fixture(params=[cpu, gpu], ids=["cpu", "gpu"])
def form(request, monkeypatch):
    """The module of one device's forms, in force. The GPU's are plain MLX and run anywhere."""
    if request.param is gpu and kernels.on_cpu() and not shutil.which("g++"):
        pytest.skip("MLX's CPU back end compiles with g++, which is not installed")
    monkeypatch.setattr(kernels, "on_cpu", lambda: request.param is cpu)
    return request.param


@pytest.fixture(params=[1 << 18, 48], ids=["whole", "in parts"])
def cacheful(request, monkeypatch):
    """Small inputs go through the CPU's forms in one part, and in many."""
    monkeypatch.setattr(cpu, "CACHEFUL", request.param)
    monkeypatch.setattr(cpu, "PACKED", min(cpu.PACKED, request.param))


def torch_of(array):
    import torch

    return torch.tensor(array).double()


def activations():
    from torch.nn import functional as F

    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
        "relu_squared": lambda x: F.relu(x).square(),
    }


def test_the_device_chooses():
    assert kernels.forms() is (cpu if kernels.on_cpu() else gpu)


@pytest.mark.usefixtures("form", "cacheful")
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "relu_squared"])
def test_activations(name):
    wide = np.concatenate([X.ravel(), np.linspace(-90, 90, 721, dtype=np.float32), [0]])
    got = getattr(kernels, name)(mx.array(wide, dtype=mx.float32))
    want = activations()[name](torch_of(wide.astype(np.float32)))
    assert np.abs(np.array(got) - want.numpy()).max() < EQUAL * np.abs(want.numpy()).max()
    near = np.abs(wide) < 10
    assert distance(np.array(got)[near], want.numpy()[near]) < EQUAL


def test_another_activation_is_caught():
    want = activations()["gelu"](torch_of(X))
    assert distance(kernels.gelu_tanh(mx.array(X)), want) > 50 * EQUAL


@pytest.mark.usefixtures("form", "cacheful")
def test_swiglu():
    import torch

    got = kernels.swiglu(mx.array(X), mx.array(Y))
    assert distance(got, torch.nn.functional.silu(torch_of(X)) * torch_of(Y)) < EQUAL


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "relu_squared"])
def test_half_precision_stays(name, dtype):
    got = getattr(kernels, name)(mx.array(X).astype(dtype))
    assert got.dtype == dtype
    assert distance(got.astype(mx.float32), activations()[name](torch_of(X))) < 2e-2


@pytest.mark.usefixtures("form", "cacheful")
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 40)])
def test_any_shape(shape):
    x = mx.random.normal(shape)
    assert kernels.gelu(x).shape == kernels.swiglu(x, x).shape == shape


def test_powers_of_two():
    x = np.linspace(-100, 126, 5001).astype(np.float32)
    want = np.exp2(x.astype(np.float64))
    error = np.abs(np.array(cpu.exp2(mx.array(x))).astype(np.float64) / want - 1)
    assert error.max() < 3e-7
    assert cpu.exp2(mx.array([-1e30, -mx.inf])).max().item() == 2.0**-100


MASKS = {
    "none": lambda L, S: None,
    "causal": lambda L, S: "causal",
    "bool": lambda L, S: np.arange(S)[None, None, None] % 3 != 1,
    "added": lambda L, S: np.where(np.arange(S) < S - 2, 0.5, -np.inf)[None] * np.ones((L, 1)),
}


@pytest.mark.usefixtures("form", "cacheful")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "groups", "L", "S"), [(4, 4, 7, 7), (6, 2, 5, 9), (2, 1, 1, 8)])
def test_attention(mask, heads, groups, L, S):
    import torch

    random = np.random.default_rng(3)
    q, k, v = (
        random.normal(size=(2, n, rows, 16)).astype(np.float32) * 2
        for n, rows in ((heads, L), (groups, S), (groups, S))
    )
    given = MASKS[mask](L, S)
    scores = torch_of(q) @ torch_of(k).repeat_interleave(heads // groups, 1).mT * 0.25
    if mask == "causal":
        scores += torch.full((L, S), -torch.inf).triu(S - L + 1)
    elif mask == "bool":
        scores = scores.masked_fill(~torch.tensor(given), -torch.inf)
    elif mask == "added":
        scores += torch.tensor(given)
    want = scores.softmax(-1) @ torch_of(v).repeat_interleave(heads // groups, 1)
    if isinstance(given, np.ndarray):
        given = mx.array(given if mask == "bool" else given.astype(np.float32))
    got = kernels.attention(mx.array(q), mx.array(k), mx.array(v), 0.25, given)
    assert distance(got, want) < EQUAL


@pytest.mark.usefixtures("form", "cacheful")
@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 9, 7, 12), (2, 20, 15, 12)])
def test_layers_of_every_position(shape):
    fc1, fc2 = nn.Linear(12, 30), nn.Linear(30, 8, bias=False)
    x = mx.random.normal(shape)
    want = activations()["gelu"](torch_of(np.array(fc1(x))))
    assert distance(kernels.pointwise(x, fc1, kernels.gelu), want) < EQUAL
    got = kernels.mlp(x, fc1, fc2, kernels.gelu)
    assert distance(got, want @ torch_of(np.array(fc2.weight)).T) < EQUAL
    assert distance(kernels.add(got, got), 2 * np.array(got)) == 0
    assert distance(kernels.pointwise(x, fc2 if shape[-1] == 30 else fc1), fc1(x)) < EQUAL


def torch_conv(x, weight, bias, stride, groups=1):
    import torch

    y = torch.nn.functional.conv2d(
        torch_of(x).permute(0, 3, 1, 2),
        torch_of(weight).permute(0, 3, 1, 2),
        torch_of(bias),
        stride=stride,
        padding=weight.shape[1] // 2,
        groups=groups,
    )
    return torch.nn.functional.gelu(y).permute(0, 2, 3, 1)


@pytest.mark.usefixtures("form", "cacheful")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5)])
def test_conv2d(stride, height, width):
    random = np.random.default_rng(2)
    x = random.normal(size=(2, height, width, 3)).astype(np.float32)
    weight, bias = (random.normal(size=s).astype(np.float32) for s in ((6, 3, 3, 3), 6))
    got = kernels.conv2d(mx.array(x), mx.array(weight), mx.array(bias), stride, kernels.gelu)
    assert distance(got, torch_conv(x, weight, bias, stride)) < EQUAL


@pytest.mark.usefixtures("form", "cacheful")
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (7, 5), (33, 17)])
def test_depthwise_conv2d(size, stride, height, width, outputs):
    random = np.random.default_rng(2)
    x = random.normal(size=(2, height, width, 6)).astype(np.float32)
    weights = random.normal(size=(outputs, 6, size, size, 1)).astype(np.float32)
    bias = random.normal(size=outputs * 6).astype(np.float32)
    want = [
        torch_conv(x, weight, part, stride, groups=6)
        for weight, part in zip(weights, np.split(bias, outputs), strict=True)
    ]
    got = kernels.depthwise_conv2d(
        mx.array(x), list(mx.array(weights)), mx.array(bias), stride, kernels.gelu
    )
    assert distance(got, np.concatenate(want, axis=-1)) < EQUAL
    bare = kernels.depthwise_conv2d(mx.array(x), list(mx.array(weights)), None, stride)
    assert distance(kernels.gelu(bare + mx.array(bias)), got) < EQUAL
