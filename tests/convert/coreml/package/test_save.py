"""A package in the same bytes each time; arrays beside it: written and readable, or one line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.package import save
from mlx_vlm_edge_convert.coreml.package.messages import parse
from mlx_vlm_edge_convert.coreml.part import Function
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mlx_vlm_edge.errors import UsageError


def test_arrays_are_written_for_whoever_may_read_the_folder(tmp_path):
    tmp_path.chmod(0o755)
    path = tmp_path / "x.safetensors"
    save.save_arrays({"a": np.ones(2, np.float32)}, path)
    assert [*load_file(path)] == ["a"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_package_is_the_same_bytes_each_time(tools, tmp_path):
    """Whatever names coremltools draws, and whatever order protobuf's maps have in a process."""
    mb, types = tools.mb, tools.types
    shape = mb.TensorSpec(shape=(1, 4), dtype=types.fp16)

    def program():
        body = mb.program(input_specs=[shape], opset_version=tools.ct.target.iOS16)
        return body(lambda x: mb.linear(x=x, weight=np.ones((64, 4), np.float16), name="y"))

    part = SimpleNamespace(functions=lambda: [Function("main", program)], minimum="iOS16")
    folders = [tmp_path / each / "x.mlpackage" for each in "ab"]
    written = []
    for folder in folders:
        folder.parent.mkdir()
        save.save_package(part, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []
    manifest = json.loads(written[0]["Manifest.json"])
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    model = written[0][f"Data/{root['path']}"]
    assert bool(parse(model).SerializeToString(deterministic=True) == model)


def test_no_place_to_write_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"x\.safetensors: cannot be written"):
        save.save_arrays({"a": np.ones(2)}, tmp_path / "none" / "x.safetensors")

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(UsageError, match=r"cannot be written \(I/O error: No space left") as told:
        save.save_arrays({"a": np.ones(2)}, tmp_path / "x.safetensors")
    assert "\n" not in str(told.value)
