"""What one forward pass of the full-size FastViTHD costs, counted rather than timed.

Nodes are the operations of mx.export_to_dot for the form of GPUs, counted on the CPU back end:
there MLX spells layer norm and attention out, which a GPU has as one node each, so a GPU's graph
is smaller still. mlx-vlm 0.7.10 has 1,459 counted in this way, its GELU compiled as here.
"""

import math
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_vlm_edge import kernels
from mlx_vlm_edge.kernels import cpu
from mlx_vlm_edge.vision.fastvit import FastViTHD, RepMixerBlock, VisionConfig

from ..memory import least_peak
from ..parity import distance

WHOLE = {"one by one": 900, "compiled": 700}
TINY = VisionConfig(layers=(1, 2, 1, 1, 1), embed_dims=(16, 32, 32, 64, 128))
VIEWS = {"Broadcast", "Flatten", "Reshape", "Squeeze", "Transpose", "Unflatten"}


def graph(x: mx.array, tmp_path) -> str:
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), x)
    return path.read_text()


def nodes(x: mx.array, tmp_path) -> int:
    return len(re.findall("shape=rectangle", graph(x, tmp_path)))


def bytes_written(function, x: mx.array) -> int:
    """Results of the operations of function(x), those that only look at another's left out."""
    steps: list[dict] = []
    mx.export_function(steps.append, function, x)
    return sum(
        mx.zeros((), dtype).nbytes * math.prod(shape)
        for step in steps
        if step["type"] == "primitive" and step["name"] not in VIEWS
        for _, shape, dtype in step["outputs"]
    )


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)


@pytest.fixture(scope="module")
def tower():
    tower = FastViTHD(VisionConfig())
    tower.apply(lambda p: mx.zeros(p.shape))
    mx.eval(tower.parameters())
    return tower


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("how", WHOLE)
def test_nodes_of_the_form_for_gpus(tower, tmp_path, how):
    x = mx.zeros((1, 512, 512, 3))
    mx.eval(x)
    run = tower.features if how == "one by one" else tower
    assert nodes(run(x), tmp_path) <= WHOLE[how]


def test_the_cpu_compiles_nothing(tower, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: True)
    x = mx.zeros((1, 64, 64, 3))
    mx.eval(x)
    assert "Compiled" not in graph(tower(x), tmp_path)


class UnfoldedBlock(nn.Module):
    """RepMixerBlock as it is published, 1x1 convolutions and all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False)
        self.norm = nn.BatchNorm(width)
        self.fc1 = nn.Conv2d(width, 4 * width, 1)
        self.fc2 = nn.Conv2d(4 * width, width, 1)
        self.layer_scale = mx.ones((width,))
        self.eval()

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mixer(x)
        y = self.fc2(kernels.gelu(self.fc1(self.norm(self.conv(x)))))
        return x + self.layer_scale * y


@pytest.mark.usefixtures("on_gpu")
def test_bytes_that_a_block_writes(monkeypatch):
    """In units of its map of C channels: 3x3, bias, 7x7, fc1 (4), GELU (4), fc2, sum."""
    monkeypatch.setattr(kernels.gpu, "_compiled", _as_one)
    x = mx.zeros((1, 32, 32, 64))
    folded, unfolded = RepMixerBlock(64, 256, 3), UnfoldedBlock(64)
    mx.eval(x, folded.parameters(), unfolded.parameters())
    assert bytes_written(folded, x) <= 13 * x.nbytes
    assert bytes_written(unfolded, x) >= 20 * x.nbytes


def _as_one(function):
    """An export takes a compiled function apart; its writes are those of one operation."""
    return mx.abs


def _spread(parameter: mx.array) -> mx.array:
    """Random weights that keep the signal's spread: with smaller ones nothing reaches the end."""
    inputs = math.prod(parameter.shape[1:])
    return mx.random.normal(parameter.shape) * (1.5 * inputs**-0.5 if parameter.ndim > 1 else 0.1)


@pytest.mark.skipif(
    kernels.on_cpu() and not shutil.which("g++"), reason="MLX's CPU back end compiles with g++"
)
def test_the_whole_graph_computes_what_its_operations_do(on_gpu):
    """Also with what came after it was compiled: another size, type or weight, each on its own."""
    tower = FastViTHD(TINY)
    mx.random.seed(0)
    tower.apply(_spread)
    x = mx.random.uniform(shape=(1, 128, 64, 3))
    first = tower(x)
    assert distance(first, tower.features(x)) < 1e-6
    for other in (x[:, :64], mx.concatenate([x, x], axis=2), mx.concatenate([x, x])):
        assert distance(tower(other), tower.features(other)) < 1e-6
    tower.stem.conv.weight = tower.stem.conv.weight[..., ::-1]  # red and blue swapped
    assert distance(tower(x), first) > 0.01
    assert distance(tower(x), tower.features(x)) < 1e-6
    whole = tower.features(x)
    tower.set_dtype(mx.bfloat16)
    half = tower(x.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16
    assert 1e-6 < distance(half.astype(mx.float32), whole) < 0.1


@pytest.mark.skipif(not kernels.on_cpu(), reason="the peak is that of the CPU's allocator")
def test_no_block_holds_more_than_a_few_maps(monkeypatch):
    """A ConvFFN's hidden map, four times its input, never exists whole on the CPU."""
    monkeypatch.setattr(cpu, "CACHEFUL", 1 << 12)
    block = FastViTHD(VisionConfig(embed_dims=(32, 32, 32, 32, 32))).stages[0].blocks[0]
    x = mx.zeros((1, 128, 128, 32))
    mx.eval(x, block.parameters())
    one = x.nbytes

    def peak() -> float:
        return least_peak(lambda: block(x)) / one

    assert peak() < 6
