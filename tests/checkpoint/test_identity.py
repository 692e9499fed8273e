"""A checkpoint's identity: another one whenever an answer could be another."""

import json
import shutil

from mlx_vlm_edge.checkpoint.identity import identity


def test_a_file_that_is_replaced_is_another_checkpoint(native_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(native_folder, copy)
    before = identity(copy)
    assert before == identity(copy)
    path = next(copy.glob("*.safetensors"))
    path.write_bytes(path.read_bytes())
    assert identity(copy) != before


def test_pytorch_weights_and_configs_are_told_apart(native_folder, tmp_path):
    """What is kept for other weights would answer, wrongly."""
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
    assert len({identity(folder) for folder in folders}) == 4
