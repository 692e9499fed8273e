"""A norm of values that are held smaller by a power of two: the same as of the true ones."""

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.emit.network import SMALLEST, Network, Value

EPS, POWER = 1e-2, 3  # an eps that counts beside the variance


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_a_norm_at_a_repaired_site_is_the_norm_of_the_true_values(tools, save, tmp_path, half):
    true = np.random.default_rng(2).standard_normal((1, 16, 2, 3)).astype(np.float32) / 8
    mb, types, ct = tools.mb, tools.types, tools.ct
    dtype = types.fp16 if half else types.fp32

    def program():
        @mb.program(
            input_specs=[mb.TensorSpec(shape=true.shape, dtype=dtype)],
            opset_version=ct.target.iOS18,
        )
        def normed(x):
            net = Network(half, {"stream": POWER})
            return mb.identity(x=net.norm(Value(x, POWER, "stream"), EPS, "norm").var, name="out")

        return normed

    path = save(tmp_path / "norm.mlpackage", main=program)
    held = true / np.float32(2**POWER)
    given = held.astype(np.float16) if half else held
    got = Package(path).run("main", {"x": given})["out"].astype(np.float64)
    centred = true - true.mean(1, keepdims=True, dtype=np.float64)
    variance = (centred**2).mean(1, keepdims=True)
    want = centred / np.sqrt(variance + EPS)
    assert np.abs(got - want).max() < (1e-2 if half else 1e-5)


def test_an_eps_that_float16_cannot_hold_becomes_the_smallest_it_can(tools, save, tmp_path):
    """1e-6 of values held smaller by 2 ** 4 is 4e-9, which would round to no eps at all."""
    mb, types, ct = tools.mb, tools.types, tools.ct

    def program():
        @mb.program(
            input_specs=[mb.TensorSpec(shape=(1, 4, 1, 1), dtype=types.fp16)],
            opset_version=ct.target.iOS18,
        )
        def normed(x):
            net = Network(True, {"stream": 4})
            return mb.identity(x=net.norm(Value(x, 4, "stream"), 1e-6, "norm").var, name="out")

        return normed

    path = save(tmp_path / "flat.mlpackage", main=program)
    flat = Package(path).run("main", {"x": np.ones((1, 4, 1, 1), np.float16)})["out"]
    assert np.array_equal(flat, np.zeros_like(flat)), "0 / sqrt(0 + eps), and not 0 / 0"
    assert np.float16(SMALLEST) > 0 == np.float16(SMALLEST / 2)
