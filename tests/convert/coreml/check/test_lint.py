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


def operation(shape, kind="add", kernel=None, cached=0):
    reads = {} if kernel is None else {"weight": [(Type("fp16", (8, 8, *kernel)), True)]}
    return lint._Operation(kind, "op", "fp16", shape, reads, cached=cached)


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
        ("last-axis-1", operation((1, 31, 1, 1)), False),
        ("last-axis-1", operation((1, 32, 1, 1)), True),
        ("last-axis-1", operation((1, 65535, 1, 1)), True),
        ("last-axis-1", operation((1, 65536, 1, 1)), False),  # is the other rule's
        ("last-axis-1", operation((1, 896, 1, 2)), False),
        ("last-axis-1", operation((896,)), False),
        ("joined-cache", operation((1, 2, 64, 513), "concat", cached=1 << 16), True),
        ("joined-cache", operation((1, 2, 64, 512), "concat", cached=(1 << 16) - 1), False),
        ("joined-cache", operation((1, 2, 64, 513), "add", cached=1 << 16), False),
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


def rules_of(path):
    return [(finding.rule, finding.operation) for finding in lint.lint(path)]


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_in_groups_are_seen(tools, save, tmp_path, groups):
    """One scale a row is another form, of which no such report is known."""
    mb, types = tools.mb, tools.types

    def program():
        spec = mb.TensorSpec(shape=(1, 32, 1, 64), dtype=types.fp16)

        @mb.program(input_specs=[spec], opset_version=tools.ct.target.iOS18)
        def turned(x):
            weight = mb.constexpr_blockwise_shift_scale(
                data=np.arange(64 * 32, dtype=np.uint8).reshape(64, 32, 1, 1),
                scale=np.full((64, groups, 1, 1), 0.5, np.float16), name="grouped",
            )  # fmt: skip
            return mb.conv(x=x, weight=weight, name="product")

        return turned

    seen = rules_of(save(tmp_path / "a.mlpackage", main=program))
    assert seen == ([("groups", "constant grouped")] if groups > 1 else [])


@pytest.mark.parametrize("count", [lint.STATES, lint.STATES + 1])
def test_many_states_are_seen(tools, save, tmp_path, count):
    mb, types = tools.mb, tools.types

    def program():
        mil = tools.ct.converters.mil.mil
        states = {f"s{i}": mb.StateTensorSpec((1, 64), types.fp16) for i in range(count)}
        specs = {"x": mb.TensorSpec((1, 64), types.fp16), **states}
        whole = mil.Program()
        with mil.Function(specs, tools.ct.target.iOS18) as function:
            x = function.inputs["x"]
            for name in states:
                x = mb.add(x=x, y=mb.read_state(input=function.inputs[name]))
            function.set_outputs([x])
            whole.add_function("main", function)
        return whole

    seen = rules_of(save(tmp_path / "a.mlpackage", main=program))
    assert ("states", "state s8") in seen or count <= lint.STATES
    assert len([rule for rule, _ in seen if rule == "states"]) == count - lint.STATES


def test_many_inputs_are_seen(tools, save, tmp_path):
    mb, types = tools.mb, tools.types

    def program(count):
        def built():
            specs = {f"x{i}": mb.TensorSpec((1, 64), types.fp16) for i in range(count)}
            mil = tools.ct.converters.mil.mil
            whole = mil.Program()
            with mil.Function(specs, tools.ct.target.iOS18) as function:
                total = function.inputs["x0"]
                for name in [*specs][1:]:
                    total = mb.add(x=total, y=function.inputs[name])
                function.set_outputs([total])
                whole.add_function("main", function)
            return whole

        return built

    assert rules_of(save(tmp_path / "a.mlpackage", main=program(lint.PORTS - 1))) == []
    (seen,) = rules_of(save(tmp_path / "b.mlpackage", main=program(lint.PORTS)))
    assert seen[0] == "ports"


def test_where_data_crosses_between_units_is_seen(tools, save, tmp_path):
    """There and back again: a gather that the Neural Engine has not, between two operations."""
    mb, types = tools.mb, tools.types

    def program():
        spec = mb.TensorSpec(shape=(64, 64), dtype=types.fp16)

        @mb.program(input_specs=[spec], opset_version=tools.ct.target.iOS18)
        def there(x):
            x = mb.relu(x=x, name="before")
            x = mb.gather(
                x=x, indices=np.arange(64, dtype=np.int32)[::-1].copy(), axis=0, name="far"
            )
            x = mb.sigmoid(x=x, name="after")
            return mb.tanh(x=x, name="last")

        return there

    seen = rules_of(save(tmp_path / "a.mlpackage", main=program))
    assert seen == [
        ("unsupported-operation", "gather far"), ("crossing", "gather far"),
        ("crossing", "sigmoid after"),
    ]  # fmt: skip
