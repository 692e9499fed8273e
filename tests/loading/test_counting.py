"""Counting: each kind of call by hand, nothing evaluated, nobody else counted or held up."""

import threading

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_vlm_edge.kernels import cpu, forms, gpu, on_cpu
from mlx_vlm_edge.kernels.dense import Dense
from mlx_vlm_edge.loading.counting import Work, counted, counting

from ..memory import Peak


def zeros(*shape):
    return mx.zeros(shape)


@pytest.mark.parametrize(
    ("layer", "weights"),
    [(nn.Linear(6, 4), 28), (nn.Linear(6, 4, bias=False), 24), (Dense(6, 4), 28)],
)
def test_a_linear_layer(layer, weights):
    work = counted(lambda: layer(zeros(1, 5, 6)))
    assert work == Work(
        macs=5 * 6 * 4,
        matrices=24,
        weights=4 * weights,
        activations=4 * 5 * (6 + 4),
        widest=4 * 5 * (6 + 4),
    )
    assert work.flops == 240
    assert work.nbytes == 4 * (weights + 50)


def test_one_row_reads_a_matrix_that_no_rows_share():
    work = counted(lambda: nn.Linear(6, 4)(zeros(1, 1, 6)))
    assert (work.macs, work.matrices, work.weights) == (24, 0, 4 * 28)


@pytest.mark.parametrize(
    ("bits", "group", "mode"), [(4, 64, "affine"), (2, 32, "affine"), (4, 32, "mxfp4")]
)
def test_a_quantised_layer_is_read_as_it_is_packed(bits, group, mode):
    layer = nn.QuantizedLinear.from_linear(nn.Linear(128, 64, bias=False), group, bits, mode=mode)
    work = counted(lambda: layer(zeros(1, 5, 128)))
    assert (work.macs, work.matrices) == (5 * 128 * 64, 128 * 64)
    held = [layer.weight, layer.scales, *([layer.biases] if mode == "affine" else [])]
    assert work.weights == sum(array.nbytes for array in held)


@pytest.mark.parametrize(("rows", "read", "shared"), [(2, 2, 0), (4, 4, 0), (9, 4, 4)])
def test_matrices_that_rows_choose_among(rows, read, shared):
    """No more of them are read than there are rows to choose."""
    w, x = zeros(4, 64, 128), zeros(rows, 1, 128)
    chosen = mx.zeros((rows,), mx.uint32)
    work = counted(lambda: mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=chosen))
    assert (work.macs, work.matrices) == (rows * 64 * 128, shared * 64 * 128)
    assert work.weights == 4 * read * 64 * 128
    assert work.activations == 4 * rows * (64 + 128)
    packed = mx.quantize(w, 64, 4)
    quantised = counted(lambda: mx.gather_qmm(x, *packed, rhs_indices=chosen))
    assert (quantised.macs, quantised.matrices) == (work.macs, work.matrices)
    assert quantised.weights == sum(part.nbytes for part in packed) * read // 4


def test_convolutions():
    full = counted(lambda: nn.Conv2d(3, 8, 4, stride=4, bias=False)(zeros(1, 16, 16, 3)))
    assert (full.macs, full.matrices, full.weights) == (16 * 8 * 48, 8 * 48, 4 * 8 * 48)
    weight = zeros(6, 3, 3, 1)
    depthwise = counted(lambda: mx.conv2d(zeros(1, 8, 8, 6), weight, 1, 1, groups=6))
    assert (depthwise.macs, depthwise.matrices) == (64 * 6 * 9, 0)
    assert depthwise.activations == 4 * 2 * 64 * 6


@pytest.mark.parametrize(
    ("L", "S", "mask", "pairs"),
    [(5, 5, None, 25), (5, 5, "causal", 15), (2, 5, "causal", 9), (1, 5, "causal", 5)],
)
def test_attention_by_the_pairs_that_meet(L, S, mask, pairs):
    q, k = zeros(1, 4, L, 8), zeros(1, 2, S, 8)
    work = counted(lambda: mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask))
    assert (work.macs, work.attention) == (0, 4 * pairs * 16)
    assert work.activations == 4 * (2 * q.size + 2 * k.size)


def test_works_add_up_and_repeat():
    one = Work(1, 2, 3, 4, 5, 6)
    assert one + Work(1, 1, 1, 1, 1, 1) == Work(2, 3, 4, 5, 6, 6)
    assert one.times(3) == Work(3, 6, 9, 12, 15, 6)


def test_nothing_is_evaluated_not_even_when_it_is_asked_for():
    peak = Peak()
    with counting() as counter:
        x = zeros(1 << 16, 1 << 16) @ zeros(1 << 16, 1 << 16)
        mx.eval(x)
        assert counter.take().macs == 1 << 48
        assert counter.take() == Work()
    assert peak.bytes < 1 << 16


def test_other_threads_compute_as_ever_and_are_not_counted():
    results = []

    def other():
        x = mx.ones((2, 3)) @ mx.ones((3, 2))
        mx.eval(x)
        results.append((x.tolist(), forms()))

    with counting() as counter:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert forms() is gpu
        assert counter.take() == Work()
    assert results == [([[3, 3], [3, 3]], cpu if on_cpu() else gpu)]


def test_all_is_as_before_afterwards_even_after_a_failure():
    before = [mx.matmul, mx.array.__matmul__, mx.eval, mx.fast.rms_norm, forms()]

    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        counted(fails)
    assert [mx.matmul, mx.array.__matmul__, mx.eval, mx.fast.rms_norm, forms()] == before
