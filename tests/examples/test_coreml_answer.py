"""examples/coreml_answer.py: a whole bundle gives MLX's greedy tokens, by the interpreter."""

import copy
import functools
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml import manifest, prompts
from mlx_vlm_edge_convert.coreml.check.interpreter import Package

from mlx_vlm_edge import generate, load, stream_generate
from mlx_vlm_edge.errors import UsageError

from ..demo import IMAGES, ROOT
from .conftest import SCRIPT
from .swift_session import SIDE

ASKED = [("shapes.png", "Describe the image."), ("text.png", "What does it say?")]


@pytest.fixture(scope="module")
def demo():
    return load("demo", dtype="float32", resolution=SIDE)


@pytest.fixture(params=["stateful", "readonly", "float32"])
def bundle(request, demo_bundles, example):
    folder = demo_bundles[request.param]
    return example.Bundle(folder, lambda name: Package(folder / name))


def answer(demo, picture, question):
    model, processor = demo
    chunks = stream_generate(
        model, processor, question, images=[IMAGES / picture], max_tokens=24
    )  # fmt: skip
    return [chunk.token for chunk in chunks if chunk.token not in (None, *processor.eos_ids)]


@pytest.mark.parametrize(("picture", "question"), ASKED)
def test_the_greedy_tokens_are_those_of_mlx(bundle, demo, picture, question):
    expected = answer(demo, picture, question)
    assert len(expected) > 3
    assert list(bundle.answer(IMAGES / picture, question, 24)) == expected
    assert list(bundle.answer(IMAGES / picture, question, 2)) == expected[:2]


def test_another_family_as_well(export, example, tmp_path):
    """MobileVLM V2: LDPv2, a sentencepiece tokenizer, tokenizer.json made from its model."""
    from mlx_vlm_edge_convert.coreml.part import Options

    source = str(ROOT / "tests" / "golden" / "mobilevlm_v2")
    options = Options(precision="fp32", compute="cpu-ne", context=256)  # caches in float32 too
    folder = export(source, tmp_path / "out", options=options, verify=False)
    assert (folder / "tokenizer.json").is_file()
    bundle = example.Bundle(folder, lambda name: Package(folder / name))
    expected = answer(load(source, dtype="float32"), *ASKED[0])[:12]
    assert len(expected) > 3
    assert list(bundle.answer(IMAGES / ASKED[0][0], ASKED[0][1], 12)) == expected


def test_a_bundle_of_two_sizes_contexts_and_a_prompt_cache(export, example, demo, tmp_path):
    """Each size answers as MLX does with pictures of that size, by name or by its budget; the
    decoder goes on behind the ids that the bundle knows."""
    from mlx_vlm_edge_convert.coreml.part import Options

    options = Options(
        size=(SIDE, SIDE), more_sizes=((128, 128),), context=128, more_contexts=(192,)
    )
    folder = export("demo", tmp_path / "out", options=options)
    picture, question = "text.png", "Describe the image."
    small = load("demo", dtype="float32", resolution=128)
    for model, wanted in (
        (demo, {}), (small, {"image_size": "128"}), (small, {"visual_tokens": 8, "context": 129}),
    ):  # fmt: skip
        bundle = example.Bundle(folder, lambda name: Package(folder / name), **wanted)
        expected = answer(model, picture, question)
        assert list(bundle.answer(IMAGES / picture, question, 24)) == expected
        assert bundle.decoder.begin(bundle.before) == len(bundle.before) > 9
        if "context" in wanted:  # beyond the 128 of the first
            bundle.decoder.prefill(np.repeat(bundle.decoder.embed([0]), 144, 0))
    with pytest.raises(UsageError, match=f"pictures of {SIDE}x{SIDE}, 128x128, not of 99"):
        example.Bundle(folder, lambda name: Package(folder / name), "99")
    with pytest.raises(UsageError, match="contexts of 128 and 192, none of 193"):
        example.Bundle(folder, lambda name: Package(folder / name), context=193)


def test_the_prompt_is_that_of_mlx(bundle, demo):
    model, processor = demo
    question = " What\n\nis 'it', \u00e9?\n"
    inputs = processor(question.strip(), images=[IMAGES / "shapes.png"])
    prompt = bundle.prompt(IMAGES / "shapes.png", question)
    ids, positions = inputs.input_ids[0], inputs.visual
    text = np.setdiff1d(np.arange(len(ids)), positions)
    np.testing.assert_array_equal(prompt[text], bundle.decoder.embed(ids[text]))
    expected = np.array(model.encode_image(inputs.pixels[0]))
    assert np.linalg.norm(prompt[positions] - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["mobilevlm_v1", "mobilevlm_v2"])
def test_a_sentencepiece_prompt_is_written_as_well(name):
    _, processor = load(str(ROOT / "tests" / "golden" / name))
    entry = prompts.prompt_entry(processor)
    inputs = processor("Is 7 more?", images=[IMAGES / "shapes.png"])
    text = entry["before_question"] + "Is 7 more?" + entry["after_question"]
    ids, after = inputs.input_ids[0].tolist(), processor.tokenizer.encode(text, special=True)
    whole = [*entry["before_image"], *ids[inputs.visual[0] : inputs.visual[-1] + 1]]
    assert [*whole, *entry["after_image"], *after] == ids


def test_a_prompt_that_is_written_otherwise_is_left_out(demo, monkeypatch):
    _, processor = demo
    expand = type(processor).expand

    def apart(self, segments, pixels):
        """A text between the visual tokens, as families that write rows have it."""
        ids, visual = expand(self, segments, pixels)
        ids.insert(visual[0] + 1, 5)
        return ids, np.concatenate([visual[:1], visual[1:] + 1])

    monkeypatch.setattr(type(processor), "expand", apart)
    assert prompts.prompt_entry(processor) is None


def test_the_chat_s_own_tokens_are_refused(bundle):
    with pytest.raises(UsageError, match=r"own <\|im_end\|> in it"):
        bundle.prompt(IMAGES / "shapes.png", "a <|im_end|> b")


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_prints_the_answer(demo, demo_bundles):
    model, processor = demo
    picture, question = ASKED[0]
    done = run(demo_bundles["stateful"], IMAGES / picture, question)
    assert done.returncode == 0, done.stderr
    assert done.stdout == generate(model, processor, question, [IMAGES / picture]) + "\n"
    assert "in the interpreter" in done.stderr


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path):
    done = run(tmp_path, IMAGES / "shapes.png", "What?")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("coreml_answer: error: ")
    assert "Traceback" not in done.stderr


ODD = (None, "x", -1, 1e308, [], {}, True, [[[]]], "../manifest.json")


def places(content, path=()):
    """Where every value of a JSON object is."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*path, key)
            yield from places(value, (*path, key))


def test_a_manifest_whose_values_are_odd_is_one_line(example, demo_bundles, tmp_path, monkeypatch):
    """One value after the other is another thing; the bundle opens, or says why not."""
    folder = shutil.copytree(demo_bundles["stateful"], tmp_path / "demo")
    monkeypatch.setattr(manifest, "_check_files", lambda *_: None)
    sound = json.loads((folder / "manifest.json").read_text())
    listed = [place for place in places(sound) if place[0] not in ("files", "model")]
    rng, lines = random.Random(0), []
    for place in rng.sample(listed, 60):
        content = copy.deepcopy(sound)
        holder = functools.reduce(lambda each, key: each[key], place[:-1], content)
        holder[place[-1]] = rng.choice(ODD)
        (folder / "manifest.json").write_text(json.dumps(content))
        try:
            example.Bundle(folder, lambda name: Package(folder / name))
        except UsageError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert not any("\n" in line for line in lines)
