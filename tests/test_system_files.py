"""What macOS leaves in a folder is nobody's: no picture, frame, weight, snapshot or change."""

import os
import time

import mlx.core as mx
import pytest
from mlx_vlm_edge_convert import save
from mlx_vlm_edge_convert.new_folder import new_folder
from PIL import Image

from mlx_vlm_edge.checkpoint.adapter_choice import AdapterChoice
from mlx_vlm_edge.checkpoint.files import weight_files
from mlx_vlm_edge.cli import batch
from mlx_vlm_edge.hub import cache
from mlx_vlm_edge.picture.video import Video, read_video
from mlx_vlm_edge.system_files import of_the_system

REPO = "apple/FastVLM-0.5B"


def seen_by_macos(folder, *names):
    """A folder that Finder showed, with files that came from a disk without extended attributes."""
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    for name in names:
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7" + bytes(4092))


@pytest.mark.parametrize(
    ("name", "is_so"),
    [(".DS_Store", True), ("._a.png", True), (".a.png", False), ("_.png", False), ("a", False)],
)
def test_what_belongs_to_the_system(name, is_so):
    assert of_the_system(name) is is_so


def test_pictures_and_frames(tmp_path):
    for name in ("a1.png", "a2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    seen_by_macos(tmp_path, "a1.png", "a2.png")
    assert batch._pictures([str(tmp_path)]) == [str(tmp_path / f"a{n}.png") for n in (1, 2)]
    assert len(read_video(Video(tmp_path), 1.0, 8).frames) == 2


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_weights(tmp_path, name):
    (tmp_path / name).touch()
    seen_by_macos(tmp_path, name)
    assert weight_files(tmp_path) == [tmp_path / name]


def test_an_adapter_is_the_same_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    before = AdapterChoice(tmp_path).identity()
    seen_by_macos(tmp_path, "adapter_config.json")
    assert AdapterChoice(tmp_path).identity() == before


def test_the_newest_snapshot(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = cache.repository_folder(REPO) / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llava_qwen2"}')
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_text("{}")
    seen_by_macos(snapshot.parent, snapshot.name)
    later = time.time() + 5
    os.utime(snapshot.parent / ".DS_Store", (later, later))
    (model,) = cache.cached_models()
    assert (model.repo, model.complete) == (REPO, True)
    assert cache.whole_snapshot(REPO) == snapshot


def test_a_folder_that_is_written_does_not_list_them(tmp_path):
    seen_by_macos(tmp_path, "config.json")
    with new_folder(tmp_path, listed=save.written_files) as folder:  # it counts as empty
        seen_by_macos(folder, "model.safetensors")
        save.save_weights(folder, {"x": mx.zeros(2)})
    assert {*save.written_files(tmp_path)} == {"model.safetensors.index.json", "model.safetensors"}


def test_a_bundle_is_whole_after_a_look_at_it(tmp_path):
    manifest = pytest.importorskip("mlx_vlm_edge_convert.coreml.manifest")
    inner = tmp_path / "vision.mlpackage"
    inner.mkdir()
    (inner / "weight.bin").write_bytes(b"1")
    seen_by_macos(inner, "weight.bin")
    manifest.write(tmp_path, dict.fromkeys(manifest._KEYS - {"format", "files"}) | {"parts": {}})
    seen_by_macos(tmp_path, "manifest.json")
    assert [*manifest.read(tmp_path)["files"]] == ["vision.mlpackage/weight.bin"]
    (tmp_path / "more").touch()
    with pytest.raises(manifest.UsageError, match="more is not in the manifest"):
        manifest.read(tmp_path)
