"""Quantised layers in the CPU's layout against MLX's own: the same weights, bit for bit."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge.kernels import quantized

from ..memory import Peak
from ..parity import distance

INPUTS, OUTPUTS, TOLERANCE = 256, 96, 2e-6
KINDS = [(bits, group) for bits in quantized.BITS for group in (32, 64, 128)]


class Parts(nn.Module):
    """A linear layer with and one without bias, and an embedding, quantised."""

    def __init__(self, bits: int, group: int, outputs: int = OUTPUTS, mode: str = "affine") -> None:
        super().__init__()
        self.stack = [nn.Linear(INPUTS, outputs), nn.Linear(INPUTS, outputs, bias=False)]
        self.embedding = nn.Embedding(outputs, INPUTS)
        nn.quantize(self, group, bits, mode=mode)


def original(layer):
    """The float weights [N, K] that a quantised layer of MLX stands for, in float64."""
    parts = (layer.weight, layer.scales, layer.biases)
    weight = mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits)
    return np.array(weight).astype(np.float64)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (1, quantized.ROWS), (1, 40)])
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_products(bits, group, rows):
    model = Parts(bits, group)
    before = [*model.stack, model.embedding]
    quantized.for_cpu(model)
    x = mx.random.normal((*rows, INPUTS), key=mx.random.key(1))
    for old, new in zip(before, [*model.stack, model.embedding], strict=True):
        assert type(old) is not type(new)
        got = new.as_linear(x) if isinstance(new, quantized.Embedding) else new(x)
        want = np.array(x).astype(np.float64) @ original(old).T
        if "bias" in old:
            want = want + np.array(old.bias)
        assert got.shape == want.shape
        assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_rows_of_an_embedding_are_bit_for_bit_the_same(bits, group):
    model = Parts(bits, group)
    old = model.embedding
    quantized.for_cpu(model)
    ids = mx.array([[0, 1, OUTPUTS - 1], [OUTPUTS // 2, 7, 1]])
    assert mx.array_equal(model.embedding(ids), old(ids))


@pytest.mark.parametrize("bits", quantized.BITS)
def test_words_by_hand(bits):
    """Input k of outputs i, i + N / n, ... in word [k, i]."""
    count = 32 // bits
    N, K = 2 * count, count
    values = np.random.default_rng(0).integers(0, 2**bits, (N, K))
    words = (values << (bits * np.arange(count))).sum(axis=1, keepdims=True).astype(np.uint32)
    got = np.array(quantized.turned(mx.array(words), bits))
    for k in range(K):
        for i in range(2):
            want = sum(int(values[i + 2 * place, k]) << (bits * place) for place in range(count))
            assert got[k, i] == want


def test_a_wrong_order_is_caught(monkeypatch):
    monkeypatch.setattr(quantized.Weight, "_ordered", lambda self, x: x)
    model = Parts(4, 64)
    old = model.stack[1]
    quantized.for_cpu(model)
    x = mx.random.normal((1, INPUTS))
    assert distance(model.stack[1](x), np.array(old(x))) > 1000 * TOLERANCE


@pytest.mark.parametrize(("bits", "outputs"), [(3, 96), (6, 96), (4, 100)])
def test_what_does_not_fit_stays_as_it_is(bits, outputs):
    model = Parts(bits, 64, outputs)
    quantized.for_cpu(model)
    assert type(model.stack[0]) is nn.QuantizedLinear
    assert type(model.embedding) is nn.QuantizedEmbedding


def test_other_modes_stay_as_they_are():
    model = Parts(4, 32, mode="mxfp4")
    quantized.for_cpu(model)
    assert type(model.stack[0]) is nn.QuantizedLinear


def test_nothing_is_held_twice_and_nothing_as_floats():
    model = Parts(4, 64)
    before = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    quantized.for_cpu(model)
    model.stack[0](mx.ones((1, 50, INPUTS)))
    assert sum(p.nbytes for _, p in tree_flatten(model.parameters())) == before
    codes = model.stack[0].weight.codes
    assert codes.dtype == mx.uint32
    assert codes.size * 8 == INPUTS * OUTPUTS


def test_turning_by_parts_holds_one_part_more(monkeypatch):
    """Beside the old matrix and the new one: not two more of the whole."""
    monkeypatch.setattr(quantized, "PART", 1 << 12)
    layer = nn.QuantizedLinear(1 << 11, 1 << 11, bias=False, group_size=64, bits=4)
    mx.eval(layer.parameters())
    size = layer.weight.nbytes
    peak = Peak()
    new = quantized.Weight(layer)
    mx.eval(new.parameters())
    assert peak.bytes < 1.5 * size
    x = mx.random.normal((1, 1 << 11))
    assert distance(new.times(x), np.array(x).astype(np.float64) @ original(layer).T) < TOLERANCE


def test_a_prompt_unpacks_a_part_of_the_matrix_at_a_time():
    """Bytes: of the parts, an eighth of the floats each, few are alive at once."""
    model = Parts(4, 64, outputs=4096)
    quantized.for_cpu(model)
    x = mx.random.normal((quantized.ROWS + 1, INPUTS))
    mx.eval(model.parameters(), x)
    peak = Peak()
    mx.eval(model.stack[0](x))
    whole = 4 * INPUTS * 4096
    assert peak.bytes < 0.95 * whole  # 1.10 when nothing waits for the part before


def test_layers_that_are_named_stay():
    model = Parts(4, 64)
    quantized.for_cpu(model, but="stack")
    assert isinstance(model.stack[0], nn.QuantizedLinear)
    assert isinstance(model.embedding, quantized.Embedding)
