"""Image features by a Core ML package at run time: the same answers as by MLX's tower."""

import weakref
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml import features as backend
from mlx_vlm_edge_convert.coreml.parity import Check
from mlx_vlm_edge_convert.coreml.run import cache

from mlx_vlm_edge import generate, load
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError

FLOAT32, FLOAT16 = 1e-5, 2e-2  # relative errors of features, as `export --verify` allows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
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
    monkeypatch.setattr(backend, "saved_and_checked", None)  # would fail if it were called
    load(str(native_folder), vision_backend="coreml:fp32")
    assert capsys.readouterr().err == ""


def test_a_model_is_freed_when_it_is_let_go(tools, native_folder):
    model, processor = load(str(native_folder), vision_backend="coreml:fp32")
    seen = weakref.ref(model)
    del model, processor
    assert seen() is None


def test_tiles_run_one_after_the_other(tools, native_folder):
    model, _ = load(str(native_folder), vision_backend="coreml:fp32")
    side = model.config.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    together = np.array(model.image_features(pictures))
    alone = [np.array(model.image_features(picture[None])) for picture in pictures]
    assert np.array_equal(together, np.concatenate(alone))


def test_an_export_that_fails_leaves_nothing(tools, native_folder, own_cache, monkeypatch):
    def spoiled(part, path, say):
        path.mkdir()
        raise UsageError("the exported vision is wrong")

    monkeypatch.setattr(backend, "saved_and_checked", spoiled)
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


def test_without_the_extra_one_line_names_it(native_folder, monkeypatch, capsys):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cache, "version", version)
    cache.exporter.cache_clear()
    command = ["generate", "--model", str(native_folder), "--prompt", "Hi"]
    assert main([*command, "--vision-backend", "coreml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "mlx-vlm-edge: error: Core ML export needs coremltools: pip install coremltools"
    ]


@pytest.mark.parametrize(
    ("setting", "flag"),
    [("coreml", "coreml:fp32"), ("coreml:cpu-gpu", "coreml:fp32:cpu-gpu")],
)
@pytest.mark.parametrize("leaves", ["an activation", "a weight"])
def test_what_leaves_float16_is_told_with_the_flag_that_is_there(
    native_folder, setting, flag, leaves, monkeypatch, capsys
):
    def refused(part, path, say):
        if leaves == "a weight":
            part._network().const(1e6)
        part.repaired(Check((), {"a": np.inf}), {})

    monkeypatch.setattr(backend, "saved_and_checked", refused)
    monkeypatch.setattr(cache, "exporter", lambda: "none")
    command = ["generate", "--model", str(native_folder), "--prompt", "Hi"]
    assert main([*command, "--vision-backend", setting]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"): --vision-backend {flag}" if leaves == "an activation" else
                         f"does not fit in float16: --vision-backend {flag}")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cambrian-8b", "has 4 vision towers, which no one package can be"),
        ("moe-llava-phi2-2.7b-384", "its features fill no grid"),
    ],
)
def test_a_tower_that_is_no_package_is_told_without_flags_of_export(name, said):
    from mlx_vlm_edge_bench.random.weights import blueprint

    with pytest.raises(UsageError, match=f"{said}: leave the vision backend out$"):
        backend.attach(blueprint(name).model, "weights", "coreml", print)


def test_a_family_without_a_tower_is_one_line():
    """Fuyu's shapes, nothing allocated."""
    from mlx_vlm_edge_bench.random.weights import blueprint

    model = blueprint("fuyu-8b").model
    with pytest.raises(UsageError, match=r"fuyu has no vision tower that .*: leave the vision"):
        backend.attach(model, "weights", "coreml", print)


def test_a_damaged_package_names_its_folder_and_the_way_out(tools, native_folder, own_cache):
    load(str(native_folder), vision_backend="coreml:fp32")
    (entry,) = cache.entries()
    assert entry.about["model"] == native_folder.name
    (weights,) = entry.folder.rglob("weight.bin")
    weights.write_bytes(weights.read_bytes()[:1000])
    model, _ = load(str(native_folder), vision_backend="coreml:fp32")
    side = model.config.image_size
    with pytest.raises(UsageError) as told:
        model.encoder(np.zeros((1, side, side, 3), np.uint8))
    assert str(entry.folder) in str(told.value)
    assert f"models rm --coreml {entry.name}" in str(told.value)
