"""Arrays beside a package: written and readable, or one line."""

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.package import save
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mlx_vlm_edge.errors import UsageError


def test_arrays_are_written_for_whoever_may_read_the_folder(tmp_path):
    tmp_path.chmod(0o755)
    path = tmp_path / "x.safetensors"
    save.save_arrays({"a": np.ones(2, np.float32)}, path)
    assert [*load_file(path)] == ["a"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_no_place_to_write_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"x\.safetensors: cannot be written"):
        save.save_arrays({"a": np.ones(2)}, tmp_path / "none" / "x.safetensors")

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(UsageError, match=r"cannot be written \(I/O error: No space left") as told:
        save.save_arrays({"a": np.ones(2)}, tmp_path / "x.safetensors")
    assert "\n" not in str(told.value)
