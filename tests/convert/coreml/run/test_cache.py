"""Which package belongs to which checkpoint, size and exporter: another name, another package."""

import json
import shutil

import pytest
from mlx_vlm_edge_convert.coreml.run import cache


@pytest.mark.parametrize("more", [(), ("9.0",)])
def test_sources_that_change_make_other_packages(tmp_path, more):
    (tmp_path / "emit").mkdir()
    (tmp_path / "emit" / "vit.py").write_text("SITE = 1")
    (tmp_path / "names.py").write_text("IMAGE = 1")
    rooms = [tmp_path / "emit", tmp_path / "names.py"]
    seen = [cache.sources(rooms, *more)]
    assert cache.sources(rooms, *more) == seen[0]
    (tmp_path / "emit" / "vit.py").write_text("SITE = 2")
    seen.append(cache.sources(rooms, *more))
    (tmp_path / "emit" / "vit.py").rename(tmp_path / "emit" / "vit2.py")
    seen.append(cache.sources(rooms, *more))
    (tmp_path / "names.py").write_text("IMAGE = 2")
    seen += [cache.sources(rooms, *more), cache.sources(rooms, *more, "10.0")]
    assert len({*seen}) == 5


def test_the_exporter_s_own_sources_are_in_every_key(monkeypatch):
    before = cache.key("weights", (64, 64), "fp16", "cpu-ne")
    assert before == cache.key("weights", (64, 64), "fp16", "cpu-ne")
    monkeypatch.setattr(cache, "exporter", lambda: "another one")
    assert cache.key("weights", (64, 64), "fp16", "cpu-ne") != before


def test_a_package_belongs_to_weights_size_and_precision():
    keys = {
        cache.key(weights, size, precision, compute)
        for weights in ("a", "b")
        for precision in ("fp16", "fp32")
        for compute in ("cpu-ne", "cpu-gpu")
        for size in ((64, 64), (64, 128), (128, 64))
    }
    assert len(keys) == 24


def test_a_file_that_is_replaced_is_another_checkpoint(native_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(native_folder, copy)
    before = cache.identity(copy)
    assert before == cache.identity(copy)
    path = next(copy.glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    assert cache.identity(copy) != before


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
    assert len({cache.identity(folder) for folder in folders}) == 4
