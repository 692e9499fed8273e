"""The interpreter: every operation by itself, what it refuses, and how it rounds."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.check.operations import OPERATIONS
from mlx_vlm_edge_convert.coreml.check.rounding import to_half

from mlx_vlm_edge.errors import UsageError

from ....parity import distance
from .cases import CASES, X, Y

CLOSE = 2e-6  # one operation in float32
WEIGHT = "Data/com.apple.CoreML/weights/weight.bin"
MODEL = "Data/com.apple.CoreML/model.mlmodel"


@pytest.fixture(scope="module")
def package(tools, save, tmp_path_factory):
    """Every case in one program, one output each."""
    mb, types, ct = tools.mb, tools.types, tools.ct

    def program():
        inputs = [mb.TensorSpec(shape=X.shape, dtype=types.fp32) for _ in range(2)]

        @mb.program(input_specs=inputs, opset_version=ct.target.iOS18)
        def operations(x, y):
            made = [(name, case.build(mb, x, y)) for name, case in CASES.items()]
            return [mb.identity(x=value, name=f"out_{name}") for name, value in made]

        return operations

    return save(tmp_path_factory.mktemp("operations") / "all.mlpackage", main=program)


@pytest.fixture(scope="module")
def outputs(package):
    return Package(package).run("main", {"x": X, "y": Y})


@pytest.mark.parametrize("name", CASES)
def test_an_operation_gives_what_numpy_or_mlx_gives(outputs, name):
    found, expected = outputs[f"out_{name}"], CASES[name].expected
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= CLOSE * max(1, np.abs(expected).max())


def test_every_case_is_an_operation_that_the_package_has(package):
    function = Package(package).spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    assert {op.type for op in operations} - OPERATIONS.keys() <= {"const"}


def test_the_largest_value_of_every_operation_is_kept(package):
    tracking = Package(package, track=True)
    tracking.run("main", {"x": X, "y": Y})
    assert tracking.ranges["out_square"] == float((X * X).max())
    tracking.run("main", {"x": X * np.float32(1e30), "y": Y})
    assert tracking.ranges["out_square"] == np.inf


def test_inputs_are_held_against_what_is_declared(package):
    with pytest.raises(UsageError, match=r"'x' is \(1, 8, 6, 9\), declared \(1, 8, 6, 10\)"):
        Package(package).run("main", {"x": X[..., :9], "y": Y})
    with pytest.raises(UsageError, match="input 'y' is unmatched"):
        Package(package).run("main", {"x": X})
    with pytest.raises(UsageError, match="no function 'decode', only main"):
        Package(package).run("decode", {"x": X, "y": Y})


@pytest.fixture
def damaged(package, tmp_path):
    """A copy of the package after `change(operations by type)`."""

    def damage(change):
        copy = tmp_path / "damaged.mlpackage"
        shutil.copytree(package, copy)
        spec = Package(copy).spec
        function = spec.mlProgram.functions["main"]
        operations = function.block_specializations[function.opset].operations
        change({op.type: op for op in operations})
        (copy / MODEL).write_bytes(spec.SerializeToString())
        return copy

    return damage


def rename(ops):
    ops["softmax"].type = "entmax"


def reshape(ops):
    ops["linear"].outputs[0].type.tensorType.dimensions[3].constant.size = 6


def retype(ops):
    ops["linear"].outputs[0].type.tensorType.dataType = 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename, r"entmax '.*': the interpreter does not know this operation"),
        (reshape, r"linear '.*': gives \(1, 8, 6, 5\), declared \(1, 8, 6, 6\)"),
        (retype, r"linear '.*': takes fp32, declared fp16"),
    ],
)
def test_a_program_that_lies_is_refused(damaged, change, says):
    with pytest.raises(UsageError, match=says):
        Package(damaged(change)).run("main", {"x": X, "y": Y})


def cut(data):
    return data[:-1000]


def wiped(data):
    return data[:64] + bytes(4) + data[68:]


def another_version(data):
    return data[:4] + b"\1" + data[5:]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut, "weight.bin (is cut off: .* bytes are missing|ends before its record)"),
        (wiped, "weight.bin has no record at 64"),
        (another_version, "weight.bin has version 1, not 2"),
        (lambda data: b"", "weight.bin cannot be read"),
    ],
)
def test_a_damaged_weight_file_is_one_clear_line(package, tmp_path, change, says):
    copy = tmp_path / "damaged.mlpackage"
    shutil.copytree(package, copy)
    (copy / WEIGHT).write_bytes(change((package / WEIGHT).read_bytes()))
    with pytest.raises(UsageError, match=says):
        Package(copy).run("main", {"x": X, "y": Y})


def test_what_is_no_package_is_one_clear_line(package, tmp_path):
    with pytest.raises(UsageError, match="is not a whole Core ML package"):
        Package(tmp_path / "none.mlpackage")
    copy = tmp_path / "damaged.mlpackage"
    shutil.copytree(package, copy)
    (copy / MODEL).write_bytes((package / MODEL).read_bytes()[:-7])
    with pytest.raises(UsageError, match=r"model.mlmodel is damaged"):
        Package(copy)


def test_float16_is_numpy_s_float16_for_every_value_and_every_tie():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every)]
    ties = (every[:-1].astype(np.float64) + every[1:]).astype(np.float32) / 2
    around = [np.nextafter(ties, np.float32(way)) for way in (-np.inf, np.inf)]
    special = np.array([np.nan, np.inf, -np.inf, 65519.99, 65520, 1e38, -1e5, 1e-40], np.float32)
    for values in (every, ties, *around, special):
        with np.errstate(all="ignore"):
            expected = values.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(to_half(values), expected)


def test_erf_is_accurate_to_float32():
    x = np.linspace(-6, 6, 20001, dtype=np.float32)
    exact = np.array([math.erf(v) for v in x.tolist()])
    assert np.abs(OPERATIONS["erf"](x) - exact).max() < 5e-7


def test_float16_packages_round_and_need_not(tools, save, tmp_path):
    mb, types, ct = tools.mb, tools.types, tools.ct

    def program():
        inputs = [mb.TensorSpec(shape=(1, 64), dtype=types.fp16)]

        @mb.program(input_specs=inputs, opset_version=ct.target.iOS18)
        def square(x):
            return mb.reduce_sum(x=mb.mul(x=x, y=x), axes=[-1], name="y")

        return square

    path = save(tmp_path / "half.mlpackage", main=program)
    x = np.linspace(0.5, 300, 64, dtype=np.float32)[None]
    exact = float((x.astype(np.float64) ** 2).sum())
    rounded = Package(path, track=True)
    assert rounded.run("main", {"x": x})["y"].dtype == np.float16
    assert rounded.ranges["y"] == np.inf  # 90,000 and more are beyond float16
    wide = Package(path, "fp32").run("main", {"x": x})["y"]
    assert wide.dtype == np.float32
    assert distance(np.append(wide, 0), [exact, 0]) < 1e-6


def test_shapes_that_may_vary_are_held_to_their_ranges(tools, tmp_path):
    mb, ct = tools.mb, tools.ct
    length = ct.RangeDim(2, 5, default=3)
    varying = mb.TensorSpec(shape=(1, ct.converters.mil.mil.get_new_symbol()))

    @mb.program(input_specs=[varying], opset_version=ct.target.iOS18)
    def doubled(x):
        return mb.add(x=x, y=x, name="y")

    for name, shapes in {
        "range": ct.Shape((1, length)),
        "list": ct.EnumeratedShapes([(1, 2), (1, 5)], default=(1, 2)),
    }.items():
        model = ct.convert(
            doubled, minimum_deployment_target=ct.target.iOS18,
            inputs=[ct.TensorType(name="x", shape=shapes)], skip_model_load=True,
        )  # fmt: skip
        model.save(str(tmp_path / f"{name}.mlpackage"))
        package = Package(tmp_path / f"{name}.mlpackage")
        assert package.run("main", {"x": np.ones((1, 5), np.float32)})["y"].shape == (1, 5)
        with pytest.raises(UsageError, match="input 'x' is"):
            package.run("main", {"x": np.ones((1, 6), np.float32)})
    with pytest.raises(UsageError, match="input 'x' is"):
        package.run("main", {"x": np.ones((1, 3), np.float32)})


def test_a_package_is_read_without_importing_coremltools(package):
    code = (
        "import sys; from mlx_vlm_edge_convert.coreml.check.interpreter import Package;"
        f"Package({str(package)!r}); assert 'coremltools' not in sys.modules;"
        "import coremltools; assert coremltools.proto.Model_pb2.Model().SerializeToString() == b''"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def _updating(tools, update):
    """A program of a state [4, 8] with one row more in each call; update(mb, read, new) -> what it
    gives besides writing `new`."""
    mb, mil = tools.mb, tools.ct.converters.mil.mil
    program = mil.Program()
    specs = {
        "row": mb.TensorSpec((1, 8), tools.types.fp16),
        "at": mb.TensorSpec((1,), tools.types.int32),
        "rows": mb.StateTensorSpec((4, 8), tools.types.fp16),
    }
    with mil.Function(specs, tools.ct.target.iOS18) as function:
        rows, at = function.inputs["rows"], function.inputs["at"]
        read, zero = mb.read_state(input=rows), np.array([0], np.int32)
        begin = mb.concat(values=[at, zero], axis=0)
        stop = mb.concat(values=[mb.add(x=at, y=np.array([1], np.int32)), zero + 8], axis=0)
        before = update(mb, read)
        new = mb.slice_update(x=read, update=function.inputs["row"], begin=begin, end=stop)
        whole = mb.coreml_update_state(state=rows, value=new)
        function.set_outputs([mb.mul(x=before, y=np.float16(2)), mb.mul(x=whole, y=np.float16(2))])
        program.add_function("main", function)
    return program


@pytest.mark.parametrize("mode", ["declared", "fp32"])
@pytest.mark.parametrize(
    ("update", "copies"),
    [
        (lambda mb, read: mb.abs(x=read), 0),
        (lambda mb, read: mb.slice_by_index(x=read, begin=[0, 0], end=[4, 8]), 1),
        (lambda mb, read: read, 1),
    ],
    ids=["a value", "a view", "itself"],
)
def test_what_was_read_of_a_state_stays_what_it_was(
    tools, save, tmp_path, monkeypatch, mode, update, copies
):
    """Though the state is written where it is, when nobody needs that: in the first program."""
    path = save(tmp_path / "a.mlpackage", main=lambda: _updating(tools, update))
    package, copied, sound = Package(path, mode), [], OPERATIONS["slice_update"]
    monkeypatch.setitem(OPERATIONS, "slice_update", lambda **of: copied.append(1) or sound(**of))
    state = package.new_state()
    expected, outputs = np.zeros((4, 8), np.float32), []
    for at in range(3):
        row = np.full((1, 8), at + 1, np.float16)
        before, whole = package.run("main", {"row": row, "at": np.array([at])}, state).values()
        np.testing.assert_array_equal(before, 2 * expected)
        expected[at] = at + 1
        np.testing.assert_array_equal(whole, 2 * expected)
        outputs.append((whole, 2 * expected))
    assert len(copied) == 3 * copies
    for whole, then in outputs:
        np.testing.assert_array_equal(whole, then)
