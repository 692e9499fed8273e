"""Towers and connectors of every family as Core ML packages, run and compared with MLX."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml import export as exporting
from mlx_vlm_edge_convert.coreml import manifest
from mlx_vlm_edge_convert.coreml.check import audit
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.check.rounded import check_rounded
from mlx_vlm_edge_convert.coreml.emit import network
from mlx_vlm_edge_convert.coreml.package.interface import blocks
from mlx_vlm_edge_convert.coreml.package.save import save_package
from mlx_vlm_edge_convert.coreml.package.saved import Saved, type_of
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.parts import vision
from mlx_vlm_edge_convert.coreml.parts.decoder import DecoderPart
from mlx_vlm_edge_convert.coreml.parts.encoders import encoder
from PIL import Image

from mlx_vlm_edge import load
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading import cost

from .. import schema
from ..planted import amplify

GOLDEN = ("mobilevlm_v1", "mobilevlm_v2", "eve_tiny", "fastvlm_tiny", "moe_llava_stablelm")


@pytest.fixture(scope="module")
def folders(native_folder, golden, tmp_path_factory):
    """A model folder by name: the golden ones, and the originals' at a tiny size."""
    from ....reference import convllava, eve2, idefics3, llava, llava_onevision
    from ...conftest import golden_folder

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        if name == "fastvlm":
            return native_folder
        if name == "fastvlm_tiny":
            return golden_folder(golden, "apple_llava", folder)
        if name in GOLDEN:
            return golden.parent / name
        if name == "smolvlm":
            case = idefics3.CASES[name]
            return idefics3.save(idefics3.build(case), case, folder)
        if name == "llava":
            return llava.save(llava.build(), "hub", folder)
        if name == "siglip":
            said = {"vision_config": llava.SIGLIP, "vision_feature_select_strategy": "full"}
            return llava.save(llava.build(llava.SIGLIP, "full"), "hub", folder, **said)
        if name == "eve2":
            return eve2.save(eve2.build(), folder)
        if name == "convllava":
            return convllava.inside(folder)
        weights = llava_onevision.weights(llava_onevision.build())
        return llava_onevision.save(weights, folder, "native")

    return make


def model_of(folder):
    from mlx_vlm_edge.loading.load import read_checkpoint
    from mlx_vlm_edge.models import family
    from mlx_vlm_edge.models.build import build

    config, arrays = read_checkpoint(folder)
    model = build(family(config), config, arrays)
    model.apply(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p)
    return model


def cases_of(made):
    height, width = made.pixels.size
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return [vision.Case("random pixels", noise, made)]


def part_of(made, options, connector=False, **changes):
    segment = vision.Connector(made) if connector else vision.Tower(made, options)
    return vision.VisionPart(segment, options, cases_of(made), **changes)


def verified(part, path):
    """The part as saved, and its check, which it passed."""
    part, check = part.verified(path)
    assert all(parity.passed for parity in check.parity), check.parity
    return part, check


@pytest.fixture(scope="module")
def fastvlm(native_folder):
    """A tiny FastVLM under whose weights no signal dies out."""
    return model_of(native_folder)


FAMILIES = (*GOLDEN, "smolvlm", "llava", "siglip", "eve2", "llava_onevision", "convllava")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_float32_and_float16(name, folders, tmp_path):
    made = encoder(model_of(folders(name)), None, None)
    fused = part_of(made, Options(precision="fp16"))
    _, check = verified(fused, tmp_path / "fused.mlpackage")  # its float32 twin is checked as well
    assert [parity.limit for parity in check.parity] == [vision.GRAPH, vision.HALF]


@pytest.mark.parametrize("name", ["fastvlm", "mobilevlm_v2"])
def test_an_app_pads_in_the_colour_of_the_processor(name, folders, native_folder):
    model, processor = load(str(native_folder if name == "fastvlm" else folders(name)))
    pixels = encoder(model, None, None).pixels
    assert pixels.strategy == "pad"
    corner = processor.preprocess(Image.new("RGB", (60, 30), "white")).data[0, 0]
    assert manifest.preprocessing_entry(pixels)["fill"] == corner.tolist()


@pytest.mark.parametrize("name", ["mobilevlm_v2", "smolvlm"])
def test_head_by_head_from_a_tensor_and_the_connector_apart(name, folders, tmp_path):
    made = encoder(model_of(folders(name)), None, None)
    apart = Options(precision="fp32", compute="cpu-ne", fused=False, image_input=False)
    verified(part_of(made, apart), tmp_path / "apart.mlpackage")
    verified(part_of(made, apart, connector=True), tmp_path / "connector.mlpackage")


def test_any_multiple_of_64(fastvlm, tmp_path):
    made = encoder(fastvlm, (64, 192), None)
    part = part_of(made, Options(precision="fp32"))
    verified(part, tmp_path / "wide.mlpackage")
    (output,) = Package(tmp_path / "wide.mlpackage").run(
        "main", {"image": np.zeros((1, 3, 64, 192))}
    ).values()  # fmt: skip
    assert output.shape == (1, 3, 64)


def test_the_image_s_scale_is_folded(fastvlm, tmp_path):
    """Nothing but the cast is computed in float32, and no operation scales pixels."""
    part = part_of(encoder(fastvlm, (64, 64), None), Options())
    save_package(part, tmp_path / "a.mlpackage")
    package = Package(tmp_path / "a.mlpackage", track=True)
    package.run("main", {"image": np.full((1, 3, 64, 64), 255)})
    first, second = list(package.ranges)[:2]
    assert (first, package.ranges[first]) == ("image_half", 255)
    assert second == "stem_conv"


def test_a_tanh_gelu_is_seen_in_a_float16_export(fastvlm, tmp_path, monkeypatch):
    monkeypatch.setitem(network.GELU, "gelu", "TANH_APPROXIMATION")
    part = part_of(encoder(fastvlm, (64, 64), None), Options())
    _, check = part.verified(tmp_path / "a.mlpackage")
    graph, half = check.parity
    assert not graph.passed
    assert half.passed  # which is why there is a twin


def test_another_graph_is_no_rounding_of_the_twin(fastvlm, tmp_path):
    made = encoder(fastvlm, (64, 64), None)
    for name, options in (("a", Options()), ("b", Options(precision="fp32", fused=False))):
        save_package(part_of(made, options), tmp_path / f"{name}.mlpackage")
    with pytest.raises(UsageError, match="connector_0 is not as it was emitted"):
        check_rounded(tmp_path / "a.mlpackage", tmp_path / "b.mlpackage")


@pytest.mark.parametrize(("stage", "gain"), [(1, 2.0**13), (3, 2.0**9)])
def test_streams_that_leave_float16_are_held_smaller(native_folder, tmp_path, stage, gain):
    """By a power of two in the weights around; stage 3 only by the squares in its norms."""
    model = model_of(native_folder)
    amplify(model.vision_tower, stage, gain)
    made = encoder(model, (64, 64), None)
    part, path = part_of(made, Options()), tmp_path / "high.mlpackage"
    save_package(part, path)
    (parity,) = part._run(path, vision.HALF, "").parity
    assert not parity.passed
    repaired, check = verified(part, path)
    assert {*repaired.powers} == {f"stage{stage}"}
    assert not repaired.islands
    assert max(check.ranges.values()) < audit.HELD
    assert repaired.describe()["range_repair"]["powers_of_two"] == repaired.powers


def test_what_the_last_picture_has_repaired_is_not_run_on_the_others(
    native_folder, tmp_path, monkeypatch
):
    """Of the first twin; the second one and the package are."""
    model = model_of(native_folder)
    amplify(model.vision_tower, 1, 2.0**13)
    made = encoder(model, (64, 64), None)
    part, ran, run = part_of(made, Options()), [], Package.run
    part = replace(part, cases=[vision.Case("black", 0 * part.cases[0].pixels, made), *part.cases])
    monkeypatch.setattr(Package, "run", lambda *args: ran.append(args) or run(*args))
    repaired, check = verified(part, tmp_path / "high.mlpackage")
    assert [parity.inputs for parity in check.parity] == [
        "black (graph)", "random pixels (graph)", "black",
    ]  # fmt: skip
    assert repaired.powers
    assert len(ran) == 1 + 2 + 1


def test_what_no_power_repairs_stays_in_float32_when_mixed(native_folder, tmp_path):
    model = model_of(native_folder)
    ffn = model.vision_tower.stages[2].blocks[0].ffn
    ffn.fc1.weight = ffn.fc1.weight * 2.0**14
    ffn.fc2.weight = ffn.fc2.weight / 2.0**14
    made = encoder(model, (64, 64), None)
    path = tmp_path / "hidden.mlpackage"
    with pytest.raises(UsageError, match=r"stage2_block0_\w+ reaches .* use --precision mixed"):
        part_of(made, Options()).verified(path)
    repaired, check = verified(part_of(made, Options(precision="mixed")), path)
    assert repaired.islands == {"stage2_block0_fc1", "stage2_block0_gelu"}
    assert len(check.parity) == 2
    declared = {
        op.outputs[0].name: op for _, _, block in blocks(Saved(path)) for op in block.operations
    }
    kinds = {name: type_of(op.outputs[0].type).dtype for name, op in declared.items()}
    assert kinds["stage2_block0_gelu"] == kinds["stage2_block0_fc2"] == "fp32"
    assert kinds["stage3_block0_cast_fp16"] == "fp16"


def test_ranges_and_powers():
    sites = {"a": ("one", 1), "b": ("one", 2), "c": ("two", 1)}
    ranges = {"a": 2.0**17, "b": 2.0**20, "c": 100.0, "d": 1.0}
    repair = audit.repair(ranges, sites, {})
    assert (repair.powers, repair.beyond) == ({"one": 3}, frozenset())
    again = audit.repair({**ranges, "d": float("inf")}, sites, {})
    assert again.beyond == {"d"}
    more = audit.repair({"a": 2.0**17}, sites, {"one": 3})
    assert more.powers == {"one": 6}


def test_a_mean_is_held_smaller_by_its_sum(native_folder, tmp_path):
    """Squares that float16 holds one by one, but not added up; at no site there is no power."""
    sites, ranges = {"mean": ("one", 2)}, {"mean": 2.0**9, "other": 2.0**9}
    summed = {"mean": 2.0**9, "other": 2.0**9}
    assert audit.repair(ranges, sites, {}) == audit.Repair({}, frozenset())
    assert audit.repair(ranges, sites, {}, summed) == audit.Repair({"one": 2}, frozenset())
    model = model_of(native_folder)
    amplify(model.vision_tower, 3, 2.0**6)
    part, check = verified(
        part_of(encoder(model, (64, 64), None), Options()), tmp_path / "high.mlpackage"
    )
    assert {*part.powers} == {"stage3"}
    means = {name: x for name, x in check.ranges.items() if name.startswith("stage3")}
    assert max(audit.sums(means, check.summed).values()) <= audit.HELD
    assert any(name.endswith("variance") and check.summed[name] == 64 for name in means)


@pytest.mark.parametrize(
    ("folder", "size", "said"),
    [
        ("fastvlm", (100, 64), "resolution 100x64: FastViTHD takes multiples of 64"),
        ("mobilevlm_v2", (64, 64), "this vision tower takes"),
        ("eve_tiny", (30, 30), "multiples of"),
    ],
)
def test_wrong_sizes(folder, size, said, folders):
    with pytest.raises(UsageError, match=said):
        encoder(model_of(folders(folder)), size, None)


@pytest.mark.parametrize("name", ["fastvlm", "mobilevlm_v2"])
def test_an_app_pads_with_the_processor_s_colour(name, folders):
    """The corner of a white stripe is padding, in the colour that the manifest tells apps."""
    folder = folders(name)
    entry = manifest.preprocessing_entry(encoder(model_of(folder), None, "pad").pixels)
    _, processor = load(str(folder), image_strategy="pad")
    stripe = Image.new("RGB", (400, 40), "white")
    pixels = processor.preprocess(stripe).data
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == entry["fill"]
    assert pixels[len(pixels) // 2, 0].tolist() == [255] * 3
    assert entry["strategy"] == "pad"


@pytest.mark.parametrize("name", ["smolvlm", "llava_onevision"])
def test_how_a_picture_becomes_tiles_is_not_told_as_one_resize(name, folders):
    """Idefics3 and SmolVLM resize with Lanczos, twice; a manifest has words for bicubic, once."""
    model = model_of(folders(name))
    (part,), pixels = exporting._parts(model, ("vision",), Options(), None, None, lambda: None)
    assert part.describe()["tiles"]
    assert pixels == {}


def test_a_bundle_of_tiles_has_no_preprocessing(tools, folders, tmp_path):
    out = tmp_path / "out"
    exporting.export(folders("smolvlm"), out, parts=("vision",), verify=False)
    content = manifest.read(out)
    assert not {"preprocessing", "sizes"} & content.keys()
    assert not (out / "preprocessing_vectors.json").exists()
    assert schema.faults(content) == []


def test_the_demo_model(tmp_path):
    model, _ = load("demo", dtype="float32")
    verified(part_of(encoder(model, None, None), Options()), tmp_path / "demo.mlpackage")


def test_siglip_without_its_first_patch_fills_no_grid():
    plan = cost.blueprint(configs.read("moe-llava-phi2-2.7b-384"))
    with pytest.raises(UsageError, match="fill no grid: its tower cannot be exported"):
        encoder(plan.model, None, None)


def test_experts_are_no_decoder_to_export(folders):
    with pytest.raises(UsageError, match="use --part vision"):
        DecoderPart(model_of(folders("moe_llava_stablelm")).language_model, Options())


def test_a_convnext_takes_any_multiple_of_its_stride(folders, tmp_path):
    model = model_of(folders("convllava"))
    verified(
        part_of(encoder(model, (64, 128), None), Options(precision="fp32")),
        tmp_path / "wide.mlpackage",
    )
    with pytest.raises(UsageError, match="64x96: this ConvNeXt takes multiples of 64"):
        encoder(model, (64, 96), None)
