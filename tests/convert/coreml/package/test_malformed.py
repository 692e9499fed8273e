"""Packages whose bytes are not what they were: a right result or one line, never a traceback."""

import shutil

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.package.interface import interface

from mlx_vlm_edge.errors import UsageError

DATA = "Data/com.apple.CoreML"
MODEL, WEIGHTS = f"{DATA}/model.mlmodel", f"{DATA}/weights/weight.bin"


@pytest.fixture(scope="module")
def package(tools, save, tmp_path_factory):
    mb = tools.mb

    def program():
        spec = mb.TensorSpec(shape=(1, 64), dtype=tools.types.fp32)

        @mb.program(input_specs=[spec], opset_version=tools.ct.target.iOS18)
        def small(x):
            x = mb.linear(x=x, weight=np.ones((64, 64), np.float32), bias=np.ones(64, np.float32))
            return mb.concat(values=mb.split(x=mb.relu(x=x), num_splits=2, axis=1), axis=1)

        return small

    return save(tmp_path_factory.mktemp("package") / "small.mlpackage", main=program)


def outcome(path):
    """What the readers say; None where they are content."""
    try:
        interface(path)
        Package(path).run("main", {"x": np.ones((1, 64), np.float32)})
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("file", [MODEL, WEIGHTS, "Manifest.json"])
def test_bytes_that_changed(package, tmp_path, file):
    path = shutil.copytree(package, tmp_path / "small.mlpackage")
    content, rng = (path / file).read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            changed[place] = rng.integers(0, 256)
        if rng.random() < 0.2:
            del changed[rng.integers(0, len(content)) :]
        (path / file).write_bytes(changed)
        line = outcome(path)
        assert line is None or "\n" not in line
        outcomes.add(line is None)
    assert outcomes == {True, False}  # some changes are none, or of names and numbers only


@pytest.mark.parametrize(
    "manifest",
    [
        "[]", "{}", "7", '"x"', "[" * 100_000, '{"itemInfoEntries": [], "rootModelIdentifier": 0}',
        '{"itemInfoEntries": {"a": {"path": ["x"]}}, "rootModelIdentifier": "a"}',
        '{"itemInfoEntries": {"a": {"path": "../../other"}}, "rootModelIdentifier": "a"}',
    ],
)  # fmt: skip
def test_manifests_of_another_kind(package, tmp_path, manifest):
    path = shutil.copytree(package, tmp_path / "small.mlpackage")
    (tmp_path / "other").write_bytes((package / MODEL).read_bytes())
    (path / "Manifest.json").write_text(manifest)
    assert "is not a whole Core ML package" in outcome(path)


def test_weights_of_another_folder_are_not_read(package, tmp_path):
    path = shutil.copytree(package, tmp_path / "small.mlpackage")
    (path / WEIGHTS).rename(tmp_path / "weight.bin")
    (path / WEIGHTS).symlink_to(tmp_path / "weight.bin")
    assert "is outside of it" in outcome(path)
