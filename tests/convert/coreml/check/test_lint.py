"""Rules for the Neural Engine: what they see in a package, and exactly where each begins."""

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check import lint
from mlx_vlm_edge_convert.coreml.package.saved import Type


def test_it_sees_what_float32_and_linear_layers_cost(tools, save, tmp_path):
    mb, types = tools.mb, tools.types

    def program():
        spec = mb.TensorSpec(shape=(1, 1, 2, 3, 40000), dtype=types.fp32)

        @mb.program(input_specs=[spec], opset_version=tools.ct.target.iOS18)
        def odd(x):
            x = mb.matmul(x=x, y=np.ones((1, 1, 2, 40000, 2), np.float32), name="product")
            return mb.silu(x=x, name="swish")

        return odd

    path = save(tmp_path / "odd.mlpackage", main=program)
    findings = {(finding.rule, finding.operation) for finding in lint.lint(path)}
    assert findings == {
        ("float32", "matmul product"), ("rank", "matmul product"), ("linear", "matmul product"),
        ("float32", "silu swish"), ("rank", "silu swish"), ("silu", "silu swish"),
    }  # fmt: skip


def operation(shape, kind="add", kernel=None):
    reads = {} if kernel is None else {"weight": [(Type("fp16", (8, 8, *kernel)), True)]}
    return lint._Operation(kind, "op", "fp16", shape, reads)


@pytest.mark.parametrize(
    ("rule", "op", "broken"),
    [
        ("narrow-last-axis", operation((1, 64, 33, 31)), False),  # 65,472 elements
        ("narrow-last-axis", operation((1, 64, 34, 31)), True),  # 67,456
        ("narrow-last-axis", operation((1, 1, 4096, 16)), True),  # 65,536, no fewer
        ("narrow-last-axis", operation((1, 64, 64, 32)), False),
        ("size", operation((1, 65536, 16384, 16384)), False),
        ("size", operation((1, 65537, 1, 32)), True),
        ("size", operation((1, 1, 16385, 32)), True),
        ("size", operation((1, 1, 1, 16385)), True),
        ("rank", operation((1, 1, 1, 1)), False),
        ("rank", operation((1, 1, 1, 1, 1)), True),
        ("kernel", operation((1, 8, 32, 32), "conv", (13, 13)), False),
        ("kernel", operation((1, 8, 32, 32), "conv", (3, 14)), True),
        ("dynamic-shape", operation((1, None, 32, 32)), True),
    ],
)
def test_where_a_rule_begins(rule, op, broken):
    assert (lint.RULES[rule](op) is not None) == broken


@pytest.mark.parametrize(("small", "broken"), [(10, False), (11, True)])
def test_one_percent_of_subnormal_values_is_too_many(tools, save, tmp_path, small, broken):
    mb, types = tools.mb, tools.types
    values = np.ones((1, 10, 100), np.float16)
    values.reshape(-1)[:small] = 2.0**-15

    def program():
        spec = mb.TensorSpec(shape=(1, 10, 100), dtype=types.fp16)

        @mb.program(input_specs=[spec], opset_version=tools.ct.target.iOS18)
        def added(x):
            return mb.add(x=x, y=values, name="sum")

        return added

    path = save(tmp_path / "added.mlpackage", main=program)
    rules = {finding.rule for finding in lint.lint(path)}
    assert ("subnormal-constant" in rules) == broken


@pytest.mark.parametrize("broken", [False, True])
def test_a_program_of_too_many_bytes(tools, save, tmp_path, monkeypatch, broken):
    mb, types = tools.mb, tools.types

    def program():
        spec = mb.TensorSpec(shape=(1, 4096), dtype=types.fp16)

        @mb.program(input_specs=[spec], opset_version=tools.ct.target.iOS18)
        def added(x):
            return mb.add(x=x, y=np.arange(4096, dtype=np.float16)[None], name="sum")

        return added

    path = save(tmp_path / "added.mlpackage", main=program)
    size = sum(file.stat().st_size for file in path.rglob("*.bin"))
    monkeypatch.setattr(lint, "PROGRAM_BYTES", size - broken)
    assert ("program-size" in {finding.rule for finding in lint.lint(path)}) == broken
