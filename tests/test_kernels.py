"""Every form of a kernel against torch, on whatever device the tests run."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import kernels

from .parity import FLOAT32, distance

X = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32) * 3
Y = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32) * 3


@pytest.fixture(params=["plain", "compiled"])
def form(request, monkeypatch):
    """Both ways a chain of element-wise operations is run."""
    if request.param == "compiled" and kernels.on_cpu() and not shutil.which("g++"):
        pytest.skip("MLX's CPU back end compiles with g++, which is not installed")
    monkeypatch.setattr(kernels, "on_cpu", lambda: request.param == "plain")


@pytest.mark.usefixtures("form")
def test_gelu_is_the_exact_one():
    import torch

    want = torch.nn.functional.gelu(torch.tensor(X).double())
    assert distance(kernels.gelu(mx.array(X)), want) < FLOAT32
    tanh = torch.nn.functional.gelu(torch.tensor(X).double(), approximate="tanh")
    assert distance(want, tanh) > 5 * FLOAT32


@pytest.mark.usefixtures("form")
def test_swiglu():
    import torch

    gate, up = torch.tensor(X).double(), torch.tensor(Y).double()
    got = kernels.swiglu(mx.array(X), mx.array(Y))
    assert distance(got, torch.nn.functional.silu(gate) * up) < FLOAT32


@pytest.mark.usefixtures("form")
def test_relu_squared():
    want = np.maximum(X.astype(np.float64), 0) ** 2
    assert distance(kernels.relu_squared(mx.array(X)), want) < FLOAT32


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4)])
def test_any_shape(shape):
    x = mx.random.normal(shape)
    assert kernels.gelu(x).shape == kernels.swiglu(x, x).shape == shape


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (7, 5)])
def test_depthwise_conv2d(size, stride, height, width):
    import torch

    random = np.random.default_rng(2)
    x = random.normal(size=(2, height, width, 6)).astype(np.float32)
    weight = random.normal(size=(6, size, size, 1)).astype(np.float32)
    bias = random.normal(size=6).astype(np.float32)
    want = torch.nn.functional.conv2d(
        torch.tensor(x).permute(0, 3, 1, 2).double(),
        torch.tensor(weight).permute(0, 3, 1, 2).double(),
        torch.tensor(bias).double(),
        stride=stride,
        padding=size // 2,
        groups=6,
    ).permute(0, 2, 3, 1)
    got = kernels.depthwise_conv2d(mx.array(x), mx.array(weight), mx.array(bias), stride)
    assert distance(got, want) < FLOAT32
