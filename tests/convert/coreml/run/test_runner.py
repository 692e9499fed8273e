"""What runs a package: Core ML, played by doubles, for a Mac is not here; else the interpreter."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.emit import toolkit
from mlx_vlm_edge_convert.coreml.run import runner as running

from mlx_vlm_edge.errors import UsageError

X = np.array([1, -2, 3], np.float32)


@pytest.fixture(scope="module")
def package(tools, save, tmp_path_factory):
    """x -> |x|"""
    mb = tools.mb

    def program():
        spec = mb.TensorSpec(shape=(3,), dtype=tools.types.fp32)

        @mb.program(input_specs=[spec], opset_version=tools.ct.target.iOS18)
        def absolute(x):
            return mb.abs(x=x, name="y")

        return absolute

    return save(tmp_path_factory.mktemp("package") / "vision.mlpackage", main=program)


class Mac:
    """Core ML: its compiler writes two files, and can be cut off between them."""

    def __init__(self):
        self.seen, self.fault = [], None

    def compile_model(self, package, destination):
        self.seen.append("compile")
        Path(destination).mkdir()
        (Path(destination) / "package").write_text(package)
        if self.fault is not None:
            raise self.fault
        (Path(destination) / "end").touch()
        return destination

    def load(self, path, compute_units, function_name):
        self.seen.append(f"load {compute_units}")
        assert (Path(path) / "end").exists(), "half a compile is trusted"
        package = Package(Path((Path(path) / "package").read_text()))
        return SimpleNamespace(predict=lambda inputs: package.run("main", inputs))


@pytest.fixture
def mac(tools, monkeypatch):
    double = Mac()
    models = SimpleNamespace(
        CompiledMLModel=double.load, utils=SimpleNamespace(compile_model=double.compile_model)
    )
    units = SimpleNamespace(ALL="all", CPU_ONLY="cpu", CPU_AND_NE="ne", CPU_AND_GPU="gpu")
    ct = SimpleNamespace(models=models, ComputeUnit=units)
    monkeypatch.setattr(running, "tools", lambda: SimpleNamespace(ct=ct))
    monkeypatch.setattr(running, "require_library", lambda _: None)
    monkeypatch.setattr(sys, "platform", "darwin")
    return double


def test_it_is_compiled_once_and_runs_on_its_units(mac, package, tmp_path):
    said = []
    for units in ("cpu-ne", "cpu-gpu"):
        model = running.runner(package, units, tmp_path, said.append)
        assert model.run("main", {"x": X})["y"].tolist() == [1, 2, 3]
    assert mac.seen == ["compile", "load ne", "load gpu"]
    assert said == ["compiling vision.mlpackage for this Mac (once)"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("no\nmore")])
def test_a_compile_that_is_cut_off_is_not_trusted(mac, package, tmp_path, fault):
    mac.fault = fault
    with pytest.raises((KeyboardInterrupt, UsageError)):
        running.compiled(package, tmp_path)
    assert [*tmp_path.iterdir()] == []
    mac.fault = None
    assert (running.compiled(package, tmp_path) / "end").exists()
    assert mac.seen == ["compile", "compile"]


def test_what_a_kill_left_is_not_trusted(mac, package, tmp_path):
    """It never gets the name that is looked for."""
    seen = []

    def killed(package, destination):
        Path(destination).mkdir()
        seen.append(Path(destination).relative_to(tmp_path))
        raise SystemExit  # what stands there now would stay after a kill -9

    mac.compile_model, sound = killed, mac.compile_model
    running.tools().ct.models.utils.compile_model = killed
    with pytest.raises(SystemExit):
        running.compiled(package, tmp_path)
    (unfinished,) = seen
    assert unfinished.parts[0].startswith(".vision.")
    assert unfinished.parts[0].endswith(".partial")
    (tmp_path / unfinished).mkdir(parents=True)
    running.tools().ct.models.utils.compile_model = sound
    assert (running.compiled(package, tmp_path) / "end").exists()


def test_a_faster_process_is_no_fault(mac, package, tmp_path):
    sound = mac.compile_model

    def slower(package, destination):
        sound(package, destination)
        sound(package, str(tmp_path / "vision.mlmodelc"))

    running.tools().ct.models.utils.compile_model = slower
    assert (running.compiled(package, tmp_path) / "end").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["vision.mlmodelc"]


def test_elsewhere_the_interpreter_runs_it(package, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    model = running.runner(package, "cpu-ne", tmp_path, print)
    assert model.run("main", {"x": X})["y"].tolist() == [1, 2, 3]
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(UsageError, match="on a Mac only"):
        running.compiled(package, tmp_path)


def test_coremltools_without_what_reaches_core_ml_is_one_line(package, tmp_path, monkeypatch):
    """As pip builds it of its sources; here, too, nothing of it reaches Core ML."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match=r"its library libcoremlpython, .*--only-binary=:all: "):
        running.runner(package, "cpu-ne", tmp_path, print)
    assert [*tmp_path.iterdir()] == []


def test_coremltools_that_cannot_write_weights_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools.libmilstoragepython", None)
    with pytest.raises(UsageError, match="its library libmilstoragepython, as where"):
        toolkit.tools.__wrapped__()


def test_a_state_is_written_from_its_start(mac, package, tmp_path):
    """Core ML's states, which are read and written whole, and the interpreter's."""

    class State(dict):
        read_state = dict.__getitem__
        write_state = dict.__setitem__

    model = running.runner(package, "cpu-ne", tmp_path, lambda _: None)
    whole = Package(package)
    for runs, state in ((model, State()), (whole, {})):
        state["keys"] = np.arange(6.0).reshape(1, 3, 2)
        runs.write(state, "keys", np.full((1, 2, 2), 9.0))
        assert runs.read(state, "keys").tolist() == [[[9, 9], [9, 9], [4, 5]]]
