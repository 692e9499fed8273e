"""What one forward pass of the full-size FastViTHD costs, counted rather than timed.

Nodes are the operations of mx.export_to_dot, counted on the CPU back end, where MLX spells layer
norm and attention out; mlx-vlm 0.7.10 has 1,459 of them, its GELU compiled as here.
"""

import re

import mlx.core as mx
import pytest

from mlx_vlm_edge import kernels
from mlx_vlm_edge.kernels import cpu
from mlx_vlm_edge.vision.fastvit import FastViTHD, VisionConfig

WHOLE = {"one by one": 1040, "compiled": 850}


def nodes(x: mx.array, tmp_path) -> int:
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), x)
    return len(re.findall("shape=rectangle", path.read_text()))


@pytest.fixture(scope="module")
def tower():
    tower = FastViTHD(VisionConfig())
    tower.apply(lambda p: mx.zeros(p.shape))
    mx.eval(tower.parameters())
    return tower


@pytest.mark.parametrize("how", WHOLE)
def test_nodes_of_the_form_for_gpus(tower, tmp_path, monkeypatch, how):
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    x = mx.zeros((1, 512, 512, 3))
    mx.eval(x)
    run = tower if how == "one by one" else mx.compile(lambda x: tower(x))
    assert nodes(run(x), tmp_path) <= WHOLE[how]


@pytest.mark.skipif(not kernels.on_cpu(), reason="the peak is that of the CPU's allocator")
def test_no_block_holds_more_than_a_few_maps(monkeypatch):
    """A ConvFFN's hidden map, four times its input, never exists whole on the CPU."""
    monkeypatch.setattr(cpu, "CACHEFUL", 1 << 12)
    block = FastViTHD(VisionConfig(embed_dims=(32, 32, 32, 32, 32))).stages[0].blocks[0]
    x = mx.zeros((1, 128, 128, 32))
    mx.eval(x, block.parameters())
    one = x.nbytes

    def peak() -> float:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(block(x))
        return (mx.get_peak_memory() - before) / one

    assert peak() < 6
