"""A converted folder is complete, loads strictly, and appears whole or not at all."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx_vlm_edge_convert import convert, pipeline, reparam, verify
from mlx_vlm_edge_convert.save import save_weights

from mlx_vlm_edge.checkpoint.files import weight_files
from mlx_vlm_edge.checkpoint.weights import read_header
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.load import read_checkpoint
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.build import build

from .conftest import golden_folder

PARTS = ("vision tower", "connector", "decoder layers", "logits")


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("layout", ["apple_llava", "transformers_native"])
def test_what_is_written_loads_and_gives_the_golden_features(layout, golden, tmp_path):
    source = golden_folder(golden, layout, tmp_path / "src")
    out = convert(source, tmp_path / "out", verify=True)
    assert names(out) == {
        "config.json", "model.safetensors", "model.safetensors.index.json",
        "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    }  # fmt: skip
    config, arrays = read_checkpoint(out)
    assert family(config).is_native(arrays)
    model = build(family(config), config, arrays)
    expected = mx.load(str(golden / "expected.safetensors"))
    pixels = expected["pixel_values"].transpose(0, 2, 3, 1)
    features = model.vision_tower(pixels)
    want = expected["vision_features_nchw"].transpose(0, 2, 3, 1).flatten(1, 2)
    assert float(mx.max(mx.abs(features - want))) < 2e-5
    tokens = model.mm_projector(features)
    assert float(mx.max(mx.abs(tokens - expected["projected"]))) < 2e-5


def test_processor_files_name_what_mlx_swift_lm_looks_for(apple, tmp_path):
    (apple / "preprocessor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "own": 1})
    )
    out = convert(apple, tmp_path / "out")
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert written["processor_class"] == "FastVLMProcessor"
    assert written["crop_size"] == {"height": 192, "width": 192}
    assert (written["image_mean"], written["image_std"]) == ([0, 0, 0], [1, 1, 1])
    assert written["own"] == 1
    assert json.loads((out / "processor_config.json").read_text())["patch_size"] == 64


@pytest.mark.parametrize("file", ["preprocessor_config", "processor_config"])
def test_settings_of_either_file_reach_the_converted_model(file, transformers_folder, tmp_path):
    """transformers 5 writes them into processor_config.json; the loader reads both."""
    settings = {"do_pad": True, "crop_size": {"height": 256, "width": 256}, "own": 1}
    content = settings if file == "preprocessor_config" else {"image_processor": settings}
    (transformers_folder / f"{file}.json").write_text(json.dumps(content))
    loaded, _ = read_checkpoint(transformers_folder)
    out = convert(transformers_folder, tmp_path / "out")
    for config in (loaded, read_checkpoint(out)[0]):
        assert config["image_aspect_ratio"] == "pad"
        assert config["vision_config"]["image_size"] == 256
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert written["own"] == 1
    assert written["crop_size"] == {"height": 256, "width": 256}


def test_shards_stay_below_the_limit_and_the_index_names_them(tmp_path):
    weights = {f"w{i}": mx.full((100,), i, dtype=mx.float32) for i in range(10)}
    weights["big"] = mx.zeros((1000,))
    want = dict(weights)
    save_weights(tmp_path, weights, shard_bytes=1000)
    assert weights == {}
    shards = weight_files(tmp_path)
    assert [path.name for path in shards][:2] == [
        "model-00001-of-00006.safetensors",
        "model-00002-of-00006.safetensors",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 10 * 400 + 4000
    assert set(index["weight_map"]) == set(want)
    for shard in shards:
        header = read_header(shard)
        assert sum(item.nbytes for item in header.values()) <= 1000 or set(header) == {"big"}
        arrays, metadata = mx.load(str(shard), return_metadata=True)
        assert metadata == {"format": "mlx"}
        for name, array in arrays.items():
            assert index["weight_map"][name] == shard.name
            assert mx.array_equal(array, want[name])


def test_a_sharded_folder_loads_as_one(apple, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pipeline.save_weights, "__kwdefaults__", {"shard_bytes": 500_000, "report": None}
    )
    out = convert(apple, tmp_path / "out", verify=True)
    assert len(weight_files(out)) > 2


def test_an_existing_folder_is_kept_unless_told(apple, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(apple, out)  # empty: fine
    before = (out / "config.json").read_text()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="--overwrite"):
        convert(apple, out, bits=8, group_size=32)
    assert (out / "config.json").read_text() == before
    assert (out / "mine.txt").exists()
    with pytest.raises(UsageError, match=r"a model of ours in it \(mine\.txt\)"):
        convert(apple, out, bits=8, group_size=32, overwrite=True)
    assert (out / "config.json").read_text() == before
    (out / "mine.txt").unlink()
    (out / ".DS_Store").touch()  # of no one
    convert(apple, out, bits=8, group_size=32, overwrite=True)
    assert "quantization" in json.loads((out / "config.json").read_text())
    with pytest.raises(UsageError, match="is the source"):
        convert(apple, apple, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        convert(apple, tmp_path / "file")


def test_a_model_that_convert_did_not_write_is_not_overwritten(apple, tmp_path):
    """A config.json, weights and all: but it may be the only copy of someone's work."""
    theirs = shutil.copytree(apple, tmp_path / "theirs")
    with pytest.raises(UsageError, match=r"a model of ours in it \(config\.json\)"):
        convert(apple, theirs, overwrite=True)
    assert names(theirs) == names(apple)


def test_a_target_in_the_way_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "obtain", lambda _: pytest.fail("fetched"))
    (tmp_path / "mine.txt").touch()
    for out, said in ((tmp_path, "not empty"), (tmp_path / "mine.txt", "is a file")):
        with pytest.raises(UsageError, match=said):
            convert("fastvlm-0.5b", out)


def test_values_that_leave_the_range_of_a_type_are_not_written(apple, tmp_path):
    path = apple / "model.safetensors"
    weights = mx.load(str(path))
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name] * 1e7
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    convert(apple, tmp_path / "bfloat16", dtype="bfloat16")
    with pytest.raises(UsageError, match=r"up_proj\.weight has values .* not finite in float16"):
        convert(apple, tmp_path / "out", dtype="float16")
    assert names(tmp_path) == {"apple", "bfloat16"}


def test_too_little_disk_is_said_before_writing(apple, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UsageError, match=r"\d [GM]B to write, \d+ [GM]B free"):
        convert(apple, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_extra_and_misshapen_weights_write_nothing(apple, tmp_path):
    path = apple / "model.safetensors"
    whole = mx.load(str(path))
    mx.eval(whole)
    name = "model.layers.0.mlp.up_proj.weight"
    for change, said in (
        (lambda w: w.pop(name), "lacks"),
        (lambda w: w.update({name: mx.zeros((3, 3))}), r"is \(3, 3\)"),
        (lambda w: w.update({name.replace("0", "7"): w[name]}), "no model part uses"),
    ):
        weights = dict(whole)
        change(weights)
        mx.save_safetensors(str(path), weights)
        with pytest.raises(UsageError, match=said):
            convert(apple, tmp_path / "out")
        assert names(tmp_path) == {"apple"}


def test_verify_reports_every_part_and_refuses_a_wrong_one(apple, tmp_path, monkeypatch):
    lines: list[str] = []
    convert(apple, tmp_path / "out", bits=8, group_size=32, verify=True, report=lines.append)
    said = "\n".join(lines)
    assert all(f"{part}: max abs" in said for part in PARTS)
    assert "vision tower: max abs 0.00e+00, relative 0.00e+00 (at most 1e-05)" in said
    assert lines[-2] == "verified: every part is within its limit"
    real = pipeline.save_weights

    def faulty(folder, weights, **options):
        name = "language_model.model.layers.1.self_attn.o_proj.weight"
        weights[name] = weights[name].T
        real(folder, weights, **options)

    monkeypatch.setattr(pipeline, "save_weights", faulty)
    with pytest.raises(UsageError, match="decoder layers off by"):
        convert(apple, tmp_path / "wrong", verify=True)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_verify_runs_the_branches_of_a_training_form(dtype, unfused, tmp_path):
    lines: list[str] = []
    convert(unfused, tmp_path / "out", dtype=dtype, verify=True, report=lines.append)
    assert any(line.startswith("  merged branches: max abs") for line in lines)


def test_an_error_that_is_no_number_fails(apple, tmp_path, monkeypatch):
    nan = verify.Error("logits", float("nan"), float("nan"))
    monkeypatch.setattr(verify, "compare", lambda *_: [nan])
    with pytest.raises(UsageError, match="logits off by nan"):
        convert(apple, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["BN_EPS", "_identity"])
def test_verify_catches_a_wrong_merge(fault, unfused, tmp_path, monkeypatch):
    real = reparam._identity
    wrong = {"BN_EPS": 1e-3, "_identity": lambda *shape: 1.001 * real(*shape)}
    monkeypatch.setattr(reparam, fault, wrong[fault])
    with pytest.raises(UsageError, match="merged branches off by"):
        convert(unfused, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_tolerances_follow_what_was_asked():
    exact, half, four = (
        verify.tolerances(*kind) for kind in ((None, None), (None, "bfloat16"), (4, None))
    )
    assert set(exact.values()) == {1e-5}
    assert half["parts"] > exact["parts"] == four["parts"]
    assert exact["logits"] < half["logits"] < four["decoder layers"] < four["logits"]


def test_the_command_line(apple, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--hf-path", str(apple), "--mlx-path", str(out), "-q", "--q-bits", "8"]
    assert main(["convert", *flags, "--q-group-size", "32"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert "writing model.safetensors" in shown.err
    block = json.loads((out / "config.json").read_text())["quantization"]
    assert (block["bits"], block["group_size"]) == (8, 32)
    assert main(["convert", str(apple), "-o", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", "-o", str(out)]) == 2
    assert main(["convert", str(apple)]) == 2
    assert main(["convert", str(apple), "-o", str(tmp_path / "new"), "--group-size", "32"]) == 2
    assert "give --bits with it" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["convert", str(tmp_path / "nowhere"), "-o", str(out)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no such folder" in message
