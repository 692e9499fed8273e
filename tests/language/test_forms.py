"""Causal attention and the output head: the CPU's forms and MLX's own, on any device."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge.kernels import cpu, gpu

from ..parity import distance

TOLERANCE = 2e-6


def arrays(*shapes):
    random = np.random.default_rng(3)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def by_hand(q, k, v, scale, visible):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.where(visible, scale * q @ k.swapaxes(2, 3), -np.inf)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("form", [cpu, gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    ("L", "S"), [(1, 1), (1, 70), (5, 5), (5, 12), (64, 64), (65, 65), (130, 200)]
)
def test_causal_attention(form, heads, kv_heads, L, S):
    q, k, v = arrays((2, heads, L, 16), (2, kv_heads, S, 16), (2, kv_heads, S, 16))
    visible = np.arange(S) <= np.arange(S - L, S)[:, None]
    want = by_hand(3 * q, k, v, 0.25, visible)
    for mask in ("causal", mx.array(visible)):
        got = form.attention(3 * mx.array(q), mx.array(k), mx.array(v), 0.25, mask)
        assert distance(got, want) < TOLERANCE
    if L > 1:
        got = form.attention(3 * mx.array(q), mx.array(k), mx.array(v), 0.25, None)
        assert distance(got, want) > 1000 * TOLERANCE


def test_the_cpu_form_never_scores_what_causal_attention_hides(monkeypatch):
    """Blocks of queries: at most (1 + 1 / blocks) / 2 of all scores, and few at once."""
    scored = []
    inner = cpu._softmax_times
    monkeypatch.setattr(
        cpu, "_softmax_times", lambda s, m, v: scored.append(s.size) or inner(s, m, v)
    )
    q, k, v = (mx.array(x) for x in arrays(*[(1, 2, 512, 16)] * 3))
    mx.eval(cpu.attention(q, k, v, 0.25, "causal"))
    blocks = 512 // cpu.QUERIES
    assert len(scored) == blocks
    assert sum(scored) == 2 * 512 * 512 * (1 + 1 / blocks) / 2


@pytest.mark.parametrize("form", [cpu, gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("N", [cpu.TALL * 3, 100])
def test_tall_matmul(form, rows, N):
    x, weight = arrays((1, rows, 32), (N, 32))
    got = form.tall_matmul(mx.array(x), mx.array(weight))
    assert distance(got, x.astype(np.float64) @ weight.T.astype(np.float64)) < TOLERANCE


def test_exp2():
    x = np.linspace(-99, 120, 10001, dtype=np.float32)
    got = np.array(cpu.exp2(mx.array(x))).astype(np.float64)
    assert np.abs(got / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7
    far = np.array(cpu.exp2(mx.array([-1e30, -math.inf, -300.0])))
    assert (far == 2.0**-100).all()
