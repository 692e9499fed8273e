"""benchmarks/coreml_on_mac.py, with doubles in the place of what only a Mac has.

The double's models compute with the interpreter, and take what coremltools' own signatures take.
"""

import enum
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("coremltools", reason="Core ML export is an extra")

import coreml_on_mac as script
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.emit.toolkit import tools
from mlx_vlm_edge_convert.coreml.export import export
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.run import runner as device

from mlx_vlm_edge.errors import UsageError


class ComputeUnit(enum.Enum):
    ALL, CPU_ONLY, CPU_AND_GPU, CPU_AND_NE = range(4)


class MLGPUComputeDevice:
    pass


class MLNeuralEngineComputeDevice:
    pass


def operation(name, device=None, cost=None, blocks=()):
    return SimpleNamespace(operator_name=name, device=device, cost=cost, blocks=blocks)


def block(*operations):
    return SimpleNamespace(operations=operations)


class Plan:
    """The program of every package: a convolution on the Neural Engine, the rest on the GPU."""

    def __init__(self):
        engine, gpu = MLNeuralEngineComputeDevice(), MLGPUComputeDevice()
        inner = block(operation("mul", gpu, 0.125), operation("mul", gpu, None))
        main = block(
            operation("const"), operation("conv", engine, 0.75),
            operation("cond", gpu, 0.125, (inner,)),
        )  # fmt: skip
        functions = {name: SimpleNamespace(block=main) for name in ("main", "prefill", "decode")}
        program = SimpleNamespace(functions=functions)
        self.model_structure = SimpleNamespace(program=program)

    @classmethod
    def load_from_path(cls, path, compute_units):
        real = tools().ct.models.compute_plan.MLComputePlan.load_from_path
        inspect.signature(real).bind(path, compute_units=compute_units)
        assert path.endswith(".mlmodelc")
        return cls()

    def get_compute_device_usage_for_mlprogram_operation(self, op):
        return op.device and SimpleNamespace(preferred_compute_device=op.device)

    def get_estimated_cost_for_mlprogram_operation(self, op):
        return None if op.cost is None else SimpleNamespace(weight=op.cost)


class Model:
    """A package in the interpreter; the Neural Engine refuses."""

    wrong = 0.0
    loaded: list[tuple[str, str | None]]

    def __init__(self, path, **options):
        real = tools().ct.models.CompiledMLModel.__init__
        inspect.signature(real).bind(self, path, **options)
        assert isinstance(options["compute_units"], ComputeUnit)
        if options["compute_units"] is ComputeUnit.CPU_AND_NE:
            raise RuntimeError("Error in building plan.\nmore")
        self.function = options["function_name"] or "main"
        self.loaded.append((path.rpartition("/")[2], options["function_name"]))
        with open(f"{path}/package") as file:
            self.package = Package(file.read())

    def make_state(self):
        return self.package.new_state(self.function)

    def predict(self, data, state=None):
        inputs = {}
        for name, value in data.items():
            if isinstance(value, Image.Image):
                value = np.asarray(value).transpose(2, 0, 1)[None].astype(np.float32)
            inputs[name] = value
        found = self.package.run(self.function, inputs, state)
        return {name: value * (1 + self.wrong) for name, value in found.items()}


def compile_model(model, destination_path=None):
    from pathlib import Path

    Path(destination_path).mkdir()
    (Path(destination_path) / "package").write_text(model)
    return destination_path


@pytest.fixture
def mac(monkeypatch):
    """Core ML's doubles where the script and the device look for them; what was loaded."""
    models = SimpleNamespace(
        CompiledMLModel=Model, utils=SimpleNamespace(compile_model=compile_model),
        compute_plan=SimpleNamespace(MLComputePlan=Plan),
    )  # fmt: skip
    ct = SimpleNamespace(ComputeUnit=ComputeUnit, models=models, __version__="9.0")
    for module in (device, script):
        monkeypatch.setattr(module, "tools", lambda: SimpleNamespace(ct=ct))
        monkeypatch.setattr(module, "require_mac", lambda: None)
    monkeypatch.setattr(Model, "wrong", 0.0)
    monkeypatch.setattr(Model, "loaded", [], raising=False)
    return Model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The demo model for the GPU: a picture, states, two functions."""
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    return export("demo", folder, options=Options(context=64), verify=False)


def measure(bundle, tmp_path, *arguments):
    file = tmp_path / "result.json"
    command = [str(bundle), "--json", str(file), "--runs", "2", "--warmup", "1", *arguments]
    assert script.main(command) == 0
    return json.loads(file.read_text())


def test_a_bundle_is_measured_on_every_choice(mac, bundle, tmp_path, capsys):
    record = measure(bundle, tmp_path, "--compute", "cpu-gpu", "cpu-ne")
    assert record["packages"].keys() == {"vision.mlpackage", "decoder.mlpackage"}
    decoder = record["packages"]["decoder.mlpackage"]
    assert decoder["compile_s"] > 0
    assert decoder["functions"].keys() == {"prefill", "decode"}
    result = decoder["functions"]["prefill"]["cpu-gpu"]
    assert result["relative_error"] == 0
    assert len(result["predict_s"]["values"]) == 2
    assert result["predict_s"]["min"] <= result["predict_s"]["median"]
    assert result["plan"]["operations"] == {"not said": 1, "Neural Engine": 1, "GPU": 3}
    assert result["plan"]["cost"] == {"not said": 0.0, "Neural Engine": 0.75, "GPU": 0.25}
    assert result["plan"]["kinds"]["GPU"] == {"cond": 1, "mul": 2}
    refused = decoder["functions"]["prefill"]["cpu-ne"]["failed"]
    assert refused == "decoder.mlpackage: Core ML cannot load it (Error in building plan.)"
    assert set(mac.loaded) == {
        ("vision.mlmodelc", None), ("decoder.mlmodelc", "prefill"), ("decoder.mlmodelc", "decode")
    }  # fmt: skip
    assert record["settings"] == {"warmup": 1, "runs": 2}
    assert record["machine"]["cores"]
    shown = capsys.readouterr().out
    assert "Neural Engine 1 (75% of the cost)" in shown
    assert "cpu-ne: failed: decoder.mlpackage" in shown


def test_an_output_that_is_off_is_told(mac, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(mac, "wrong", 0.125)
    record = measure(bundle, tmp_path, "--compute", "cpu")
    main = record["packages"]["vision.mlpackage"]["functions"]["main"]["cpu"]
    assert main["relative_error"] == pytest.approx(0.125, rel=0.01)


@pytest.mark.parametrize(
    ("found", "expected"),
    [({}, np.inf), ({"x": np.array([np.nan, 1.0])}, np.inf), ({"x": np.ones((2, 1))}, np.inf),
     ({"x": np.array([3.0, 4.5])}, 0.1)],
)  # fmt: skip
def test_the_error_of_outputs(found, expected):
    assert script.error(found, {"x": np.array([3.0, 4.0])}) == pytest.approx(expected)


def test_what_was_measured_stays_when_the_rest_fails(mac, bundle, tmp_path, monkeypatch):
    attempt, seen = script.attempt, []

    def interrupted(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return attempt(*arguments)

    monkeypatch.setattr(script, "attempt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(bundle, tmp_path)
    record = json.loads((tmp_path / "result.json").read_text())
    assert len(record["packages"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_elsewhere_than_on_a_mac_it_is_one_line(bundle, tmp_path, capsys):
    assert script.main([str(bundle), "--json", str(tmp_path / "x.json")]) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        "coreml_on_mac: error: Core ML runs packages on a Mac only, and this is none\n"
    )
    assert (shown.out, [*tmp_path.iterdir()]) == ("", [])


def test_a_device_says_what_core_ml_said(mac, bundle, tmp_path):
    package = bundle / "vision.mlpackage"
    path = device.compiled(package, tmp_path)
    assert device.compiled(package, tmp_path) == path
    refused = device.CoreMLPackage(package, path, "cpu-ne")
    with pytest.raises(UsageError, match=r"cannot load it \(Error in building plan"):
        refused.run("main", {})
