"""A vision tower as a Core AI asset, run by Core AI's own runtime and compared with MLX."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml import coreai
from mlx_vlm_edge_convert.coreml import export as exporting
from mlx_vlm_edge_convert.coreml.emit.network import Network
from mlx_vlm_edge_convert.coreml.manifest import read
from mlx_vlm_edge_convert.coreml.parity import distance
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.parts.encoders import encoder
from mlx_vlm_edge_convert.coreml.parts.pictures import drawn_cases
from mlx_vlm_edge_convert.coreml.parts.vision import Tower

from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError


@pytest.fixture(scope="module")
def runtime(tools):
    pytest.importorskip("coreai.runtime", reason="Core AI's runtime is an extra, a beta")


def export(folder, out, *more):
    command = ["export", str(folder), "-o", str(out), "--part", "vision", "--format", "coreai"]
    return main([*command, *more])


def test_the_asset_is_what_mlx_computes(runtime, native_folder, tmp_path):
    """FastViTHD with its connector, in float32: convolutions, attention, squeeze-and-excite."""
    assert export(native_folder, tmp_path / "bundle", "--precision", "fp32") == 0
    entry = read(tmp_path / "bundle")["parts"]["vision"]["coreai"]
    assert entry["package"] == "vision.aimodel"
    (parity,) = entry["parity"]
    assert parity["error"] < 5e-6 < parity["limit"]


def test_a_wrong_translation_leaves_nothing(runtime, native_folder, tmp_path, monkeypatch, capsys):
    faulty = {**coreai._TRANSLATIONS, "gelu": lambda t, op: t.ca.relu(t.get(op, "x"))}
    monkeypatch.setattr(coreai, "_TRANSLATIONS", faulty)
    assert export(native_folder, tmp_path / "bundle", "--precision", "fp32") == 2
    assert "the Core AI asset is wrong" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["mobilevlm_v1", "mobilevlm_v2", "eve_tiny"])
def test_every_operation_of_the_other_towers(runtime, golden, tmp_path, name):
    """Class tokens, slices, quick GELU, hard sigmoids, averages of windows."""
    model = exporting._load(golden.parent / name, ("vision",))[0]
    tower = encoder(model, None, None)
    segment = Tower(tower, Options(precision="fp32", image_input=False))
    program = segment.emit(Network(half=False))
    coreai.save_asset(program, tmp_path / "vision.aimodel")
    case = drawn_cases(tower)[0]
    (tokens,) = coreai.predict(tmp_path / "vision.aimodel", segment.inputs(case, False)).values()
    assert distance(tokens, case.reference["visual_tokens"]) < 5e-6


def test_a_tower_that_has_no_translation_is_refused_before_any_work(
    runtime, native_folder, tmp_path, monkeypatch, capsys
):
    known = {name: t for name, t in coreai._TRANSLATIONS.items() if name != "softmax"}
    monkeypatch.setattr(coreai, "_TRANSLATIONS", known)
    monkeypatch.setattr(exporting, "saved_and_checked", None)  # would fail if it were called
    assert export(native_folder, tmp_path / "bundle") == 2
    shown = capsys.readouterr().err
    assert "no translation of the operation 'softmax'" in shown
    assert shown.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_an_operation_without_translation_is_named(runtime):
    operation = SimpleNamespace(op_type="lstm", name="layer_3", outputs=[])
    with pytest.raises(UsageError, match=r"no translation of the operation 'lstm' \(layer_3\)"):
        coreai._Translation(np.float32).run(operation)


def test_without_the_extra_one_line_says_so(tools, native_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "coreai.authoring", None)
    assert export(native_folder, tmp_path / "bundle", "--no-verify") == 2
    assert "pip install coremltools coreai-core==1.0.0b3" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_the_other_parts_have_no_asset(native_folder, tmp_path, capsys):
    command = ["export", str(native_folder), "-o", str(tmp_path / "x"), "--part", "decoder"]
    assert main([*command, "--format", "coreai"]) == 2
    assert "--format coreai is the vision part's, which --part decoder" in capsys.readouterr().err
