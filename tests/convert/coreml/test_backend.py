"""Image features by a Core ML package at run time: the same answers as by MLX's tower."""

import json
import shutil
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.run import features as backend

from mlx_vlm_edge import generate, load
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError

FLOAT32, FLOAT16 = 1e-5, 2e-2  # relative errors of features, as `export --verify` allows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(backend.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["fastvlm", "mobilevlm_v2"])
def folder(request, native_folder, golden):
    return native_folder if request.param == "fastvlm" else golden.parent / request.param


def answers(model, processor, picture):
    inputs = processor("What is this?", images=[picture])
    result = generate(model, processor, "What is this?", [picture], full=True, max_tokens=8)
    return np.array(model.image_features(inputs.pixels[0].data[None])), result.text


@pytest.mark.parametrize(("setting", "limit"), [("coreml:fp32", FLOAT32), ("coreml", FLOAT16)])
def test_features_and_answers_are_those_of_mlx(tools, folder, golden, own_cache, setting, limit):
    picture = golden.parent / "mobilevlm_v1" / "landscape.png"
    want, text = answers(*load(str(folder)), picture)
    got, told = answers(*load(str(folder), vision_backend=setting), picture)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < limit
    if limit == FLOAT32:
        assert told == text
    assert len([*own_cache.iterdir()]) == 1


def test_a_package_is_exported_once(tools, native_folder, own_cache, capsys, monkeypatch):
    load(str(native_folder), vision_backend="coreml:fp32")
    assert "exporting" in capsys.readouterr().err
    monkeypatch.setattr(backend, "save_checked", None)  # would fail if it were called
    load(str(native_folder), vision_backend="coreml:fp32")
    assert capsys.readouterr().err == ""


def test_a_model_is_freed_when_it_is_let_go(tools, native_folder):
    model, processor = load(str(native_folder), vision_backend="coreml:fp32")
    seen = weakref.ref(model)
    del model, processor
    assert seen() is None


def test_a_package_belongs_to_weights_size_and_precision(native_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(native_folder, copy)
    before = backend.identity(copy)
    assert before == backend.identity(copy)
    path = next(copy.glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    assert backend.identity(copy) != before
    model, _ = load(str(native_folder))
    keys = {
        backend.CoreMLFeatures(model, weights, precision, compute)._key(size)
        for weights in ("a", "b")
        for precision in ("fp16", "fp32")
        for compute in ("cpu-ne", "cpu-gpu")
        for size in ((64, 64), (64, 128), (128, 64))
    }
    assert len(keys) == 24


def test_pytorch_weights_and_configs_are_told_apart(native_folder, tmp_path):
    """A package of other weights would answer, wrongly."""
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        shutil.copy(native_folder / "config.json", tmp_path / name)
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"weights of " + name.encode())
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    shutil.copystat(tmp_path / "one" / "pytorch_model.bin", tmp_path / "four" / "pytorch_model.bin")
    config = json.loads((native_folder / "config.json").read_text())
    told = json.dumps({**config, "image_mean": [0.1, 0.2, 0.3]})
    (tmp_path / "four" / "config.json").write_text(told)
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    assert len({backend.identity(folder) for folder in folders}) == 4


def test_tiles_run_one_after_the_other_and_masks_are_refused(tools, native_folder):
    model, _ = load(str(native_folder), vision_backend="coreml:fp32")
    side = model.config.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    together = np.array(model.image_features(pictures))
    alone = [np.array(model.image_features(picture[None])) for picture in pictures]
    assert np.array_equal(together, np.concatenate(alone))
    mask = np.ones((3, side, side), bool)
    assert np.array_equal(np.array(model.image_features(pictures, mask)), together)
    mask[2, -1] = False
    with pytest.raises(UsageError, match="whole tiles only"):
        model.image_features(pictures, mask)


def test_an_export_that_fails_leaves_nothing(tools, native_folder, own_cache, monkeypatch):
    def spoiled(part, path, say):
        path.mkdir()
        raise UsageError("the exported vision is wrong")

    monkeypatch.setattr(backend, "save_checked", spoiled)
    with pytest.raises(UsageError, match="is wrong"):
        load(str(native_folder), vision_backend="coreml")
    assert not own_cache.exists() or not [*own_cache.iterdir()]


@pytest.mark.parametrize(
    "setting", ["metal", "coreml:int8", "coreml:mixed", "coreml:fp16:fp32", "coreml:"]
)
def test_unknown_settings_are_one_line(setting, native_folder, capsys):
    command = ["generate", "--model", str(native_folder), "--prompt", "Hi"]
    assert main([*command, "--vision-backend", setting]) == 2
    error = capsys.readouterr().err
    assert f"vision back end {setting!r} is not known" in error
    assert error.count("\n") == 1


def test_a_family_without_a_tower_is_one_line():
    """Fuyu's shapes, nothing allocated."""
    from mlx_vlm_edge_bench.random.weights import blueprint

    model = blueprint("fuyu-8b").model
    with pytest.raises(UsageError, match="fuyu has no vision tower"):
        backend.attach(model, "weights", "coreml", print)


def test_a_mac_compiles_once_and_chooses_its_units(native_folder, tmp_path, monkeypatch):
    """By doubles: Core ML itself is on a Mac only."""
    seen = []

    class CompiledMLModel:
        def __init__(self, path, compute_units):
            seen.append(("load", compute_units))

        def predict(self, inputs):
            return {"image_features": np.zeros((1, 1, 4))}

    def compile_model(package, compiled):
        seen.append(("compile", package.rpartition("/")[2]))
        (tmp_path / backend.COMPILED).mkdir()

    class Ct:
        class ComputeUnit:
            CPU_AND_NE, CPU_AND_GPU = "ne", "gpu"

        class models:  # noqa: N801
            pass

    Ct.models.CompiledMLModel = CompiledMLModel
    Ct.models.utils = type("utils", (), {"compile_model": staticmethod(compile_model)})
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backend, "tools", lambda: SimpleNamespace(ct=Ct))
    for compute in ("cpu-ne", "cpu-gpu"):
        run = backend._runner(tmp_path, compute, print)
        assert run({})["image_features"].shape == (1, 1, 4)
    assert seen == [("compile", "vision.mlpackage"), ("load", "ne"), ("load", "gpu")]
