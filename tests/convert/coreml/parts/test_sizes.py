"""Several sizes of pictures in one bundle: a function for each, the weights once, each verified."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml import export as exporting
from mlx_vlm_edge_convert.coreml import manifest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.package.interface import blocks
from mlx_vlm_edge_convert.coreml.package.saved import Saved
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.parts import vision
from mlx_vlm_edge_convert.coreml.parts.encoders import encoder
from mlx_vlm_edge_convert.coreml.run.pictures import choose, picture_sizes

from mlx_vlm_edge.errors import UsageError

from .. import planted, schema
from ..grid.cells import AGREE, apart
from .test_vision import cases_of, model_of, verified

SIZES = ((64, 64), (64, 128))  # height and width
NAME = "main_128x64"
FLAT = Options(
    precision="fp32", size=SIZES[0], more_sizes=SIZES[1:], fused=False, image_input=False
)
HALF = Options(size=SIZES[0], more_sizes=SIZES[1:])
BOTH = ("vision", "connector")


@pytest.fixture(scope="module")
def model(native_folder):
    return model_of(native_folder)


@pytest.fixture(scope="module", params=["fused", "apart"])
def bundle(request, tools, native_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    options = HALF if request.param == "fused" else FLAT
    return exporting.export(native_folder, out, parts=BOTH, options=options)


def test_the_manifest_lists_the_sizes_with_their_tokens(bundle):
    content = manifest.read(bundle)
    assert schema.faults(content) == []
    assert [(each["function"], each["height"], each["width"]) for each in content["sizes"]] == [
        ("main", 64, 64), (NAME, 64, 128),
    ]  # fmt: skip
    assert [each["tokens"] for each in content["sizes"]] == [1, 2]
    assert (content["preprocessing"]["height"], content["preprocessing"]["width"]) == (64, 64)
    assert content["minimum_os"] == {"ios": "18.0", "macos": "15.0"}
    for part in content["parts"].values():
        assert {*part["functions"]} == {"main", NAME}
        told = [parity["inputs"] for parity in part["parity"]]
        assert any(NAME in each for each in told)
        assert any(NAME not in each for each in told)


def test_every_size_gives_the_model_s_visual_tokens(bundle, model):
    content = manifest.read(bundle)
    for size in picture_sizes(content):
        made = encoder(model, (size.height, size.width), None)
        (case,) = cases_of(made)
        outputs = {"image": case.pixels.transpose(2, 0, 1)[None].astype(np.float32)}
        for part in (content["parts"][name] for name in BOTH if name in content["parts"]):
            outputs = Package(bundle / part["package"], "fp32").run(size.function, outputs)
        expected = case.reference["visual_tokens"]
        assert outputs["visual_tokens"].shape == expected.shape == (1, size.tokens, 64)
        assert np.linalg.norm(outputs["visual_tokens"] - expected) < 5e-3 * np.linalg.norm(expected)


def test_a_second_reader_agrees(bundle):
    for part in manifest.read(bundle)["parts"].values():
        assert apart(bundle / part["package"], part["functions"]) < AGREE


def weights(folder, name):
    return (folder / f"{name}.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size


def test_weights_are_there_once(bundle, native_folder, tmp_path):
    content = manifest.read(bundle)
    fused = len(content["parts"]) == 1
    options = replace(HALF if fused else FLAT, more_sizes=())
    one = exporting.export(
        native_folder, tmp_path / "one", parts=BOTH, options=options, verify=False
    )
    for name in content["parts"]:
        assert weights(bundle, name) == pytest.approx(weights(one, name), rel=0.01)
    first = manifest.read(one)["sizes"]
    assert first == content["sizes"][:1]


def part_of(model, options, **changes):
    made = [encoder(model, size, None) for size in SIZES]
    views = [vision.View(vision.Tower(each, options), cases_of(each)) for each in made]
    return vision.VisionPart(
        views[0].segment, options, views[0].cases, others={NAME: views[1]}, **changes
    )


def test_ranges_are_repaired_for_all_sizes_alike(native_folder, tmp_path):
    """Each size by itself would share no weights with the others."""
    model = model_of(native_folder)
    planted.amplify(model.tower, 1, 2.0**14)
    part, check = verified(part_of(model, HALF), tmp_path / "vision.mlpackage")
    assert part.powers
    assert max(check.ranges.values()) < 65504
    whole, _ = verified(part_of(model, replace(FLAT, fused=True)), tmp_path / "whole.mlpackage")
    assert not whole.powers
    assert weights(tmp_path, "vision") == pytest.approx(weights(tmp_path, "whole") / 2, rel=0.05)


def another_activation(package, function):
    saved = Saved(package)
    block = next(block for name, _, block in blocks(saved) if name == function)
    op = next(op for op in block.operations if op.type == "gelu")
    op.type = "relu"
    del op.inputs["mode"]
    (package / planted.DATA / "model.mlmodel").write_bytes(saved.spec.SerializeToString())


def summed_with_itself(package, function):
    """The first residual sum adds one of its two values twice."""
    saved = Saved(package)
    block = next(block for name, _, block in blocks(saved) if name == function)
    op = next(op for op in block.operations if op.type == "add")
    op.inputs["y"].arguments[0].name = op.inputs["x"].arguments[0].name
    (package / planted.DATA / "model.mlmodel").write_bytes(saved.spec.SerializeToString())


@pytest.mark.parametrize(
    ("fault", "function", "options"),
    [
        (another_activation, "main", HALF), (another_activation, NAME, HALF),
        (summed_with_itself, NAME, HALF), (summed_with_itself, NAME, FLAT),
    ],
)  # fmt: skip
def test_a_fault_of_one_size_is_found(
    tools, native_folder, tmp_path, monkeypatch, fault, function, options
):
    sound = vision.save_package

    def faulty(part, path):
        sound(part, path)
        if part.options.precision == options.precision:
            fault(path, function)

    monkeypatch.setattr(vision, "save_package", faulty)
    with pytest.raises(UsageError, match="the exported vision"):
        exporting.export(native_folder, tmp_path / "out", parts=("vision",), options=options)
    assert [*tmp_path.iterdir()] == []


def test_a_host_chooses_by_name_or_by_budget(bundle):
    sizes = picture_sizes(manifest.read(bundle))
    assert choose(sizes).name == "64x64"
    assert choose(sizes, "128x64").function == NAME
    assert choose(sizes, "64").function == "main"
    assert [choose(sizes, budget=n).name for n in (1, 2, 99)] == ["64x64", "128x64", "128x64"]
    with pytest.raises(UsageError, match="pictures of 64x64, 128x64, not of 96"):
        choose(sizes, "96")
    with pytest.raises(UsageError, match="at most 0 visual tokens here: 1 at 64x64, 2 at 128x64"):
        choose(sizes, budget=0)


def test_a_bundle_from_before_has_its_one_size(bundle):
    content = json.loads(json.dumps(manifest.read(bundle)))
    del content["sizes"]
    (only,) = picture_sizes(content)
    assert (only.function, only.name) == ("main", "64x64")
    with pytest.raises(UsageError, match="not said"):
        choose([only], budget=99)
    del content["preprocessing"]
    with pytest.raises(UsageError, match="takes no pictures of one size"):
        picture_sizes(content)


def test_a_tower_of_one_size_refuses_others(tools, golden, tmp_path):
    folder = shutil.copytree(golden.parent / "mobilevlm_v2", tmp_path / "model")
    options = Options(size=(28, 28), more_sizes=((56, 56),))
    with pytest.raises(UsageError, match=r"takes .* only"):
        exporting.export(folder, tmp_path / "out", parts=("vision",), options=options)
