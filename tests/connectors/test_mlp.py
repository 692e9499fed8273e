"""mlp2x_gelu against torch."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_vlm_edge.connectors import mlp
from mlx_vlm_edge.connectors.mlp import MLP

from ..parity import FLOAT32, distance


@pytest.fixture(scope="module", params=[2, 3])
def pair(request):
    """torch's network of that depth, in float64, and ours with its weights."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Linear(48, 32)]
    for _ in range(request.param - 1):
        layers += [nn.GELU(), nn.Linear(32, 32)]
    theirs = nn.Sequential(*layers).double()
    ours = MLP(48, 32, request.param)
    weights = [(f"layers.{k}", mx.array(v.float().numpy())) for k, v in theirs.state_dict().items()]
    ours.update(tree_unflatten(weights))
    x = torch.randn(2, 9, 48, dtype=torch.float64) * 3
    return ours, mx.array(x.float().numpy()), theirs(x).detach().numpy()


def test_same_as_torch(pair):
    ours, x, want = pair
    assert distance(ours(x), want) < FLOAT32


def test_tanh_gelu_is_caught(pair, monkeypatch):
    ours, x, want = pair
    monkeypatch.setattr(
        mlp, "gelu", lambda x: 0.5 * x * (1 + mx.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    )
    assert distance(ours(x), want) > 5 * FLOAT32
