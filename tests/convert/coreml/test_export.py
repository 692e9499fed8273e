"""The export verb: a bundle that is whole, verified and described, or nothing at all."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml import card, manifest
from mlx_vlm_edge_convert.coreml import export as exporting
from mlx_vlm_edge_convert.coreml.check import lint
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.parity import distance
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.parts import vision
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend

from mlx_vlm_edge import load
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError

from ...demo import SIDE
from ...reference import tokenizer as tiny
from . import planted, schema

DEMO = ("vision", "connector")


@pytest.fixture(scope="session")
def bundle(tools, tmp_path_factory):
    """The demo model's vision part and connector, apart, as `export` writes them."""
    folder = tmp_path_factory.mktemp("bundles") / "demo"
    options = Options(compute="cpu-ne", fused=False, image_input=False)
    said = []
    exporting.export(
        "demo", folder, parts=DEMO, options=options, show_lint=True, report=said.append
    )
    return folder, said


def test_the_manifest_says_what_a_bundle_takes_of_a_phone(bundle):
    folder, _ = bundle
    content = manifest.read(folder)
    memory = content["memory"]
    assert memory["files"] == sum((folder / name).stat().st_size for name in content["files"])
    assert [phone["memory_gb"] for phone in memory["phones"]] == [4, 6, 8, 12]
    smallest = memory["phones"][0]
    assert smallest["share"] == round(memory["files"] / 2e9, 3)
    assert smallest["entitled_share"] == pytest.approx(smallest["share"] * 2 / 3, abs=1e-3)


def test_the_bundle_is_what_its_manifest_says(bundle):
    folder, said = bundle
    content = manifest.read(folder)
    assert {*content["parts"]} == {*DEMO}
    assert content["tokens"] == {"bos": 509, "eos": [509, 511], "image": -200}
    assert content["preprocessing"]["strategy"] == "pad"
    tower = content["parts"]["vision"]
    (taken,) = tower["functions"]["main"]["inputs"]
    shape = [1, 3, SIDE, SIDE]
    assert taken == {"name": "image", "kind": "tensor", "dtype": "fp16", "shape": shape}
    assert tower["compute_units"] == "cpuAndNeuralEngine"
    assert tower["minimum_os"] == {"ios": "16.0", "macos": "13.0"}
    for part in content["parts"].values():
        assert all(entry["error"] <= entry["limit"] for entry in part["parity"])
        assert part["largest_activation"] < 65504
    assert "tokenizer.json" in content["files"]
    assert any("(graph): relative error" in line for line in said)


def test_the_manifest_is_as_its_schema_has_it(bundle):
    content = manifest.read(bundle[0])
    assert schema.faults(content) == []
    del content["parts"]["vision"]["memory"]["package"]
    content["parts"]["vision"]["odd"] = 1
    content["format"] = 1
    assert len(schema.faults(content)) >= 2


def test_the_schema_describes_every_key():
    content = json.loads(schema.SCHEMA.read_text())

    def undescribed(node, at):
        for name, inner in node.get("properties", {}).items():
            if "description" not in inner and "$ref" not in inner:
                yield f"{at}.{name}"
            yield from undescribed(inner, f"{at}.{name}")
            yield from undescribed(inner.get("items", {}), f"{at}.{name}[]")

    places = {"manifest": content, **content["$defs"]}
    assert [one for name, node in places.items() for one in undescribed(node, name)] == []


def test_a_trial_is_what_the_package_was_compared_with(bundle):
    folder, _ = bundle
    parts = manifest.read(folder)["parts"]
    for name, taken, given in (
        ("vision", "image", "image_features"), ("connector", "image_features", "visual_tokens")
    ):  # fmt: skip
        arrays = load_file(folder / parts[name]["trial"]["file"])
        assert arrays.keys() == {taken, given}
        entered = arrays[taken]
        entered = entered.transpose(2, 0, 1)[None] if taken == "image" else entered
        output = Package(folder / parts[name]["package"]).run("main", {taken: entered})[given]
        assert distance(output, arrays[given].astype(np.float32)) < parts[name]["trial"]["limit"]


def test_the_card_names_licence_needs_and_parts(bundle):
    folder, _ = bundle
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "Needs iOS 16.0 or macOS 13.0" in card
    assert "| connector | connector.mlpackage |" in card
    assert "FastVLM in miniature" in (folder / "MODEL_README.md").read_text()


def test_the_card_says_of_what_was_not_verified_that_it_was_not_run(bundle, tmp_path):
    content = manifest.read(bundle[0])
    card.write(tmp_path, content)
    assert "Packages were run by an interpreter" in (tmp_path / "README.md").read_text()
    content["parts"]["vision"]["parity"] = None
    (tmp_path / "README.md").unlink()
    card.write(tmp_path, content)
    text = (tmp_path / "README.md").read_text()
    assert "were run" not in text
    assert "neither run nor compared with the MLX model (--no-verify)" in text


def vocab_and_merges(folder):
    """The reference's tokenizer as its two files, in place of tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    tiny.build().model.save(str(folder))
    path = folder / "tokenizer_config.json"
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    names = enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"), tiny.END)
    added = {str(id): {"content": name, "special": True, **flags} for id, name in names}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab and merges", "none"])
def test_a_bundle_has_tokenizer_and_prompt_or_says_what_is_missing(
    tokenizer, tools, native_folder, tmp_path
):
    folder = shutil.copytree(native_folder, tmp_path / "model")
    if tokenizer == "vocab and merges":
        vocab_and_merges(folder)
    if tokenizer == "none":
        (folder / "tokenizer.json").unlink()
    said = []
    out = exporting.export(
        folder, tmp_path / "out", parts=["connector"], verify=False, report=said.append
    )
    content = manifest.read(out)
    lines = [line for line in said if "without tokenizer and prompt" in line]
    assert bool(lines) is (tokenizer == "none") is (content["prompt"] is None)
    assert (out / "tokenizer.json").is_file() is (tokenizer != "none")
    if tokenizer != "none":
        assert tiny.STOP in content["tokens"]["eos"]
        whole = Backend.from_file(str(out / "tokenizer.json"))
        text = content["prompt"]["before_question"] + "What?<|im_end|>"
        assert whole.encode(text).ids == tiny.build().encode(text).ids


def test_its_packages_give_the_model_s_visual_tokens(bundle, examples):
    folder, _ = bundle
    model, processor = load("demo", dtype="float32")
    pixels = processor("What is it?", images=[examples / "shapes.png"]).pixels[0]
    image = pixels.data.transpose(2, 0, 1)[None]
    features = Package(folder / "vision.mlpackage").run("main", {"image": image})
    (tokens,) = Package(folder / "connector.mlpackage").run("main", features).values()
    expected = np.array(model.encode_image(pixels))
    assert np.linalg.norm(tokens[0] - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.fixture(scope="session")
def examples(request):
    return request.config.rootpath / "examples" / "images"


@pytest.mark.parametrize("change", ["missing", "extra", "changed", "format", "interface"])
def test_a_manifest_that_is_not_true(bundle, tmp_path, change):
    folder = shutil.copytree(bundle[0], tmp_path / "copy")
    path = folder / manifest.NAME
    content = json.loads(path.read_text())
    if change == "missing":
        (folder / "tokenizer.json").unlink()
    elif change == "extra":
        (folder / "notes.txt").write_text("")
    elif change == "changed":
        (folder / "tokenizer.json").write_text("{}")
    elif change == "format":
        content["format"] = 99
    else:
        content["parts"]["vision"]["functions"]["main"]["inputs"][0]["shape"][2] = 64
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError):
        manifest.read(folder)


def test_others_may_read_it(bundle, tmp_path):
    """As files and folders that are made here are; coremltools keeps some for their owner."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    usual = {path.is_dir(): path.stat().st_mode for path in tmp_path.iterdir()}
    assert {path.stat().st_mode for path in bundle[0].rglob("*") if path.is_file()} == {
        usual[False]
    }
    assert {path.stat().st_mode for path in bundle[0].rglob("*") if path.is_dir()} == {usual[True]}


def run(code, *arguments):
    """A process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


FAULTS = {
    "gelu for relu": (planted.gelu_to_relu, "not as it was emitted"),
    "a bias zeroed": (planted.bias_zeroed, "not as it was emitted"),
    "a blob truncated": (planted.blob_truncated, "weight.bin"),
    "axes swapped": (planted.transposed, "not as it was emitted|declared"),
    "blue first": (planted.blue_first, "the exported vision is wrong: off by"),
}


@pytest.mark.parametrize(
    ("fault", "precision"),
    [
        *((fault, "fp32") for fault in FAULTS),
        ("a bias zeroed", "fp16"),
        ("gelu for relu", "fp16"),
        ("blue first", "fp16"),
    ],
)
def test_planted_faults_leave_nothing_behind(
    fault, precision, tools, native_folder, tmp_path, monkeypatch
):
    plant, said = FAULTS[fault]
    sound = vision.save_package

    def faulty(part, path):
        sound(part, path)
        if part.options.precision == precision:
            plant(path)

    monkeypatch.setattr(vision, "save_package", faulty)
    options = Options(precision=precision, size=(64, 64))
    if precision == "fp32":
        said = "the exported vision is wrong: off by|weight.bin|declared"
    with pytest.raises(UsageError, match=said):
        exporting.export(native_folder, tmp_path / "out", parts=("vision",), options=options)
    assert [*tmp_path.iterdir()] == []


FULL = """
import resource, sys
from mlx_vlm_edge.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(["export", "demo", "-o", sys.argv[1], "--part", "vision", "--no-verify"]))
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    result = run(FULL, tmp_path / "out")
    assert result.returncode == 2
    assert "vision.mlpackage: cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert [*tmp_path.iterdir()] == []


def test_an_interrupt_leaves_nothing_behind(tools, native_folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting.manifest, "write", interrupted)
    options = Options(precision="fp32", size=(64, 64))
    with pytest.raises(KeyboardInterrupt):
        exporting.export(
            native_folder, tmp_path / "out", parts=("connector",), options=options, verify=False
        )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resolution", "100"], "resolution 100x100: FastViTHD takes multiples of 64"),
        (["--resolution", "huge"], "resolution 'huge': give pixels, as 1024 or HEIGHTxWIDTH"),
        (["--image-size", "64,128,64"], "--image-size 64x64 is there twice: leave one out"),
        (["--image-size", "128", "64", "128"], "--image-size 128x128 is there twice"),
        (["--image-size", "64,100"], "resolution 100x100: FastViTHD takes multiples of 64"),
        (["--image-size", "64,"], "--image-size '': give pixels"),
        (["--image-size", "64", "128", "--format", "coreai"], "coreai takes one --image-size"),
        (["--resolution", "512x768x3"], "--resolution '512x768x3': give pixels"),
        (["--part", "vision", "--bits", "4"], "--bits compresses the decoder"),
        (["--part", "vision", "--context", "64"], "--context is the decoder's, which --part v"),
        (["--part", "vision", "--head-bits", "6"], "--head-bits is the decoder's, which --part"),
        (["--part", "decoder", "--head-bits", "6"], "has 16: use it with --bits palette4"),
        (["--part", "connector", "--device", "m1"], "--device chooses for the decoder, which"),
        (["--part", "connector", "--input", "tensor"], "--input tensor is the vision part's"),
        (["--part", "decoder", "--input", "tensor"], "--input tensor is the vision part's"),
        (["--part", "decoder", "--image-size", "64"], "--image-size is for pictures, which"),
        (["--part", "decoder", "--resolution", "64"], "--resolution is for pictures, which"),
        (["--part", "decoder", "--image-strategy", "pad"], "--image-strategy is for pictures"),
        (["--part", "decoder", "--image", "x.png"], "--image is for pictures, which"),
        (["--part", "decoder", "--separate-connector"], "--separate-connector parts vision and"),
        (["--no-verify", "--image", "x.png"], "--image is what packages are verified on"),
        (["--context", "0"], "context 0"),
        (["--context", "many"], "context many: give a number of positions"),
        (["--part", "decoder", "--context", "64", "64"], "--context 64 is there twice"),
        (["--part", "decoder", "--context", "64,100"], "--context 100 is no multiple of 64"),
        (["--image-strategy", "odd"], "image strategy 'odd'"),
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
    ],
)
def test_a_user_s_mistakes_are_one_line(arguments, said, tmp_path, capsys):
    part = [] if "--part" in arguments else ["--part", "vision"]
    assert main(["export", "demo", "-o", str(tmp_path / "out"), *part, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "vision"], "is not empty"),
        (["--format", "coreai"], "pip install coremltools coreai-core==1.0.0b3"),
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
    ],
)
def test_what_is_wrong_with_any_model_is_told_before_one_is_looked_for(
    tools, tmp_path, monkeypatch, capsys, arguments, said
):
    def unwanted(*_, **__):
        raise AssertionError("looked for a model")

    monkeypatch.setattr("mlx_vlm_edge.hub.models.obtain", unwanted)
    monkeypatch.setattr(exporting, "obtain", unwanted)
    monkeypatch.setitem(sys.modules, "coreai.authoring", None)
    out = tmp_path / "out"
    if said == "is not empty":
        out.mkdir()
        (out / "thesis.txt").touch()
    assert main(["export", "someone/a-model", "-o", str(out), *arguments]) == 2
    assert said in capsys.readouterr().err
    options = Options(coreai="coreai" in arguments)
    image = arguments[1] if "--image" in arguments else None
    with pytest.raises(UsageError, match=re.escape(said)):
        exporting.export("someone/a-model", out, options=options, image=image)


def test_a_family_without_a_tower(tools, tmp_path):
    class Other:
        pass

    with pytest.raises(UsageError, match="no vision tower that can be exported"):
        exporting.encoders(Other(), None, None)


def test_a_bundle_is_replaced_only_when_asked_for(bundle, capsys):
    folder, _ = bundle
    assert main(["export", "demo", "-o", str(folder), "--part", "connector"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert manifest.read(folder)["parts"].keys() == {*DEMO}


WITHOUT = """
import sys
sys.modules["coremltools"] = None
from mlx_vlm_edge.cli import main
sys.exit(main(["export", "demo", "-o", sys.argv[1]]))
"""


def test_without_the_extra_one_line_names_it(tmp_path):
    result = run(WITHOUT, tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "mlx-vlm-edge: error: Core ML export needs coremltools: pip install coremltools"
    ]


def test_lint_names_the_rule_the_operation_and_the_reason(bundle):
    """FastViTHD for the Neural Engine: clean but for two layout operations per attention, two at
    the end, the squeeze of its last stage, whose channels stand for one position, and that stage's
    maps, which are eight wide. How many constants are subnormal is up to the training."""
    folder, said = bundle
    findings = lint.lint(folder / "vision.mlpackage")
    by_form = [finding for finding in findings if finding.rule != "subnormal-constant"]
    assert lint.counts(by_form) == {"last-axis-1": 5, "narrow-last-axis": 15, "layout": 2 * 5 + 2}
    layout = [finding for finding in findings if finding.rule == "layout"]
    assert layout[0].operation == "reshape stage3_block0_attention_rows"
    assert any("lint: layout x12" in line for line in said)


def test_sides_are_told_in_one_order_and_the_old_one_with_a_note(capsys):
    import argparse

    from mlx_vlm_edge.cli import export as verb

    def size(*arguments):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        return verb._sizes(parser.parse_args(["demo", "-o", "out", *arguments]))

    assert size() == []
    assert size("--image-size", "768x512") == size("--resolution", "512x768") == [(512, 768)]
    assert capsys.readouterr().err == "note: taken as --image-size 768x512, as other verbs say\n"
    assert size("--image-size", "512") == size("--resolution", "512") == [(512, 512)]
    assert capsys.readouterr().err == ""
