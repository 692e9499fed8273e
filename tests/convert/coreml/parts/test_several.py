"""Cambrian-1's four towers as Core ML packages of their own, DINOv2 of both kinds among them."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_vlm_edge_convert.coreml import export as exporting
from mlx_vlm_edge_convert.coreml import manifest
from mlx_vlm_edge_convert.coreml.emit import dinov2 as emitted
from mlx_vlm_edge_convert.coreml.emit.several import bilinear_matrix
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.parts.encoders import encoder, encoders

from mlx_vlm_edge import kernels, load
from mlx_vlm_edge.checkpoint.weights import Weights
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.vision.several import Tower, TowerConfig, fold

from ....reference import cambrian as theirs
from ....reference import dinov2 as plain
from .. import schema
from .test_vision import model_of, part_of, verified

TOWERS = ("siglip", "clip", "dinov2", "convnext")
FLAT = Options(precision="fp32", compute="cpu-ne", fused=False, image_input=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return theirs.native(tmp_path_factory.mktemp("cambrian"))


@pytest.fixture(scope="module")
def model(folder):
    return model_of(folder)


@pytest.mark.parametrize("index", range(4), ids=TOWERS)
def test_every_tower_in_float16_and_head_by_head(model, index, tmp_path):
    made = encoders(model, None, None)[f"vision_{index}"]
    half = Options(precision="fp16", fused=False)
    verified(part_of(made, half), tmp_path / "half.mlpackage")
    verified(part_of(made, FLAT), tmp_path / "flat.mlpackage")


@pytest.mark.parametrize(("index", "sites"), [(2, ["stream"]), (3, ["stage0", "stage2"])])
def test_values_that_are_held_smaller_come_out_true(model, index, sites, tmp_path):
    made = encoders(model, None, None)[f"vision_{index}"]
    verified(part_of(made, FLAT, powers=dict.fromkeys(sites, 3)), tmp_path / "a.mlpackage")


def test_dinov2_without_swiglu(folder, tmp_path):
    """DINOv2-L in small, in the giant's place."""
    original, config = plain.build(False)
    parsed = TowerConfig.from_dict({**config, "input_size": 42}, 3)
    arrays = {name: mx.array(array) for name, array in plain.weights(original).items()}
    folded = fold(Weights(arrays), "", parsed)
    model = model_of(folder)
    model.tower.towers[2] = tower = Tower(parsed)
    tower.update(tree_unflatten(list(folded.items())))
    views = [*model.config.views]
    views[2] = replace(views[2], tower=parsed)
    model.config = replace(model.config, views=tuple(views))
    verified(part_of(encoders(model, None, None)["vision_2"], FLAT), tmp_path / "a.mlpackage")


def test_gate_and_up_in_the_others_place_are_seen(model, tmp_path, monkeypatch):
    split = emitted.Network.split
    monkeypatch.setattr(
        emitted.Network, "split",
        lambda net, x, count, axis, name: split(net, x, count, axis, name)[
            :: -1 if name.endswith("halves") else 1
        ],
    )  # fmt: skip
    made = encoders(model, None, None)["vision_2"]
    _, check = part_of(made, FLAT).verified(tmp_path / "a.mlpackage")
    assert not any(parity.passed for parity in check.parity)


def test_the_matrix_resizes_as_mlx_does():
    x = np.random.default_rng(0).standard_normal((7, 7, 3)).astype(np.float32)
    matrix = bilinear_matrix(7, 6)
    ours = np.einsum("ih,hwc,jw->ijc", matrix, x, matrix)
    assert np.abs(ours - np.array(kernels.resize_bilinear(mx.array(x), 6, 6))).max() < 1e-6


def test_a_bundle_of_four_packages(folder, tmp_path):
    out = exporting.export(folder, tmp_path / "out", parts=["vision"], verify=False)
    content = manifest.read(out)
    assert schema.faults(content) == []
    parts = content["parts"]
    assert [*parts] == [f"vision_{index}" for index in range(4)]
    assert [part["preprocessing"]["height"] for part in parts.values()] == [98, 84, 98, 224]
    assert [part["tower"] for part in parts.values()] == [0, 1, 2, 3]
    for part in parts.values():
        (output,) = part["functions"]["main"]["outputs"]
        assert output["name"] == "image_features"


@pytest.mark.parametrize(
    ("parts", "options", "says"),
    [
        (["vision", "connector"], Options(), "4 vision towers and one connector for all"),
        (["decoder"], Options(), "use --part vision"),
        (["vision"], Options(size=(98, 98)), "a size of its own"),
        (["vision"], Options(strategy="stretch"), "go by a picture's padding"),
    ],
)
def test_what_cannot_be_exported_is_one_line(folder, tmp_path, parts, options, says):
    with pytest.raises(UsageError, match=says) as caught:
        exporting.export(folder, tmp_path / "out", parts=parts, options=options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_package_cannot_stand_in_for_four_towers(folder):
    with pytest.raises(UsageError, match="4 vision towers, which no one package can be"):
        load(str(folder), vision_backend="coreml")
    with pytest.raises(UsageError, match="no one package"):
        encoder(model_of(folder), None, None)
