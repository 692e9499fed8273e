"""Sessions of the Swift package end to end: long prompts, packed embeddings, a full context, and
bundles that are refused. Greedy ids are MLX's, or the Python host's on the same bundle."""

import json
import platform
import shutil
from itertools import accumulate

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package

from ..demo import IMAGES
from .swift_link import Link
from .swift_session import CONTEXT, MOST, QUESTIONS, SIDE, answers, mlx_answers

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which("apt-get"),
    reason="Debian's Swift is unpacked where apt-get is, on Linux and x86_64",
)
LONG = "What does it say? " * 36 + "What does it say?"  # more than 256 positions, at most 320
SHAPES = str(IMAGES / "shapes.png")


@pytest.fixture(scope="module")
def exported(export, tmp_path_factory):
    """Bundles of the demo model by the options that they are exported with, each once."""
    from mlx_vlm_edge_convert.coreml.part import Options

    folder, bundles = tmp_path_factory.mktemp("exported"), {}

    def bundle(verify=False, **options):
        name = json.dumps([verify, options])
        if name not in bundles:
            out = folder / str(len(bundles))
            shape = Options(**{"size": (SIDE, SIDE), **options})
            bundles[name] = export("demo", out, options=shape, verify=verify)
        return bundles[name]

    return bundle


FORMS = {"stateful": {}, "readonly": {"compute": "cpu-ne", "image_input": False}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("pictures", "questions"),
    [(["text.png"], [LONG]), (["shapes.png", "count.png"], [LONG]), (["shapes.png"], QUESTIONS)],
    ids=["one picture", "two pictures", "three turns"],
)
def test_a_large_prefill_and_the_package_s_own_token(
    tools, ask, exported, tmp_path, form, pictures, questions
):
    """Most of a long prompt goes through `prefill_256`. A stateful package names the token, so that
    wrong logits do no harm."""
    names = ",".join(str(IMAGES / name) for name in pictures)
    words = [names, *questions, "--max-tokens", str(MOST)]
    bundle, spoils = exported(context=512, **FORMS[form]), form == "stateful"
    said, link = answers(tools, ask, bundle, tmp_path, *words, spoils=spoils)
    expected = [ids for ids, _ in mlx_answers(pictures, questions)]
    assert [answer["report"]["tokens"] for answer in said] == expected
    prefills = [name for _, name in link.calls if name.startswith("prefill")]
    if len(questions) == 1:
        assert prefills == ["prefill_256", *["prefill"] * len(pictures)]
    else:
        assert prefills == ["prefill"] * 3
    # What goes in and out is in arrays of the session's own, those of long rows shared.
    shared, backed = (
        entry["decoder.mlpackage", "decode"] for entry in (link.shared, link.backed)
    )  # fmt: skip
    caches = {"keys", "values"} if form == "readonly" else set()
    assert shared == {"mask", *caches, *({"embeddings"} if form == "stateful" else ())}
    functions = json.loads((bundle / "manifest.json").read_text())["parts"]["decoder"]["functions"]
    outputs = functions["decode"]["outputs"]
    assert backed == {port["name"] for port in outputs if port["dtype"] == "fp16"}


def test_drawing_reads_the_logits(tools, ask, exported, tmp_path):
    words = [SHAPES, QUESTIONS[0], "--temperature", "1", "--seed", "3", "--max-tokens", str(MOST)]
    drawn = []
    for spoils in (False, True):
        folder = tmp_path / str(spoils)
        folder.mkdir()
        (said,), _ = answers(tools, ask, exported(context=512), folder, *words, spoils=spoils)
        drawn.append(said["report"]["tokens"])
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_embeddings_are_pythons(tools, ask, checks, exported, example, tmp_path, bits):
    bundle = exported(context=128, embedding_bits=bits)
    host = example.Bundle(bundle, lambda name: Package(bundle / name))
    table = host.decoder.embeddings
    ids = [0, 1, 7, len(table) // 2, len(table) - 1]
    (tmp_path / "requests").write_text(
        json.dumps([{"ask": "embedded", "bundle": str(bundle), "ids": ids}])
    )
    link = Link(tools, bundle, tmp_path)
    done = link.run(checks, str(tmp_path / "requests"))
    assert done.returncode == 0, done.stderr
    (values,) = json.loads(done.stdout)
    np.testing.assert_array_equal(np.array(values), table[ids].astype(np.float64).ravel())
    (tmp_path / "asked").unlink()
    (tmp_path / "answered").unlink()
    said, _ = answers(tools, ask, bundle, tmp_path, SHAPES, QUESTIONS[0])
    assert said[0]["report"]["tokens"] == [*host.answer(SHAPES, QUESTIONS[0], 256)]


def altered(bundle, folder, *path, value):
    """A bundle with another value in its manifest, None to take the key out."""
    copy = shutil.copytree(bundle, folder / "altered")
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    manifest.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("parts", "vision", "tiles"), True, "this model takes pictures in tiles, which EdgeVLM "
         "does not cut; export a FastVLM, MobileVLM, LLaVA or EVE model"),
        (("parts", "vision"), None, "no vision part, or several; export a model of one vision"),
        (("parts", "connector"), None, "the bundle has no connector; export it with --part all"),
        (("parts", "decoder"), None, "the bundle has no decoder; export it with --part all"),
        (("parts", "decoder", "geometry", "dtype"), "float32", "export it with --precision fp16"),
        (("parts", "decoder", "geometry", "chunk"), 65, "the decoder's geometry is not known"),
        (("parts", "decoder", "geometry", "chunks"), {"prefill": 64, "prefill_96": 96},
         "the decoder has no function prefill_96; export the bundle again"),
        (("parts", "decoder", "compute_units"), "gpuOnly", "gpuOnly are not known; update EdgeVLM"),
        (("parts", "decoder", "embeddings", "bits"), 3, "packed in 3 bits, which EdgeVLM does not"),
        (("parts", "decoder", "embeddings", "bits"), 4, "embeddings.safetensors: not scales of"),
        (("preprocessing", "resample"), "box", "its preprocessing is not bicubic RGB"),
        (("prompt",), None, "this model writes pictures as only its own code can"),
    ],
)  # fmt: skip
def test_a_bundle_that_cannot_run_is_refused_before_anything_is_loaded(
    tools, ask, demo_bundles, tmp_path, path, value, message
):
    bundle = altered(demo_bundles["readonly"], tmp_path, *path, value=value)
    link = Link(tools, bundle, tmp_path)
    done = link.run(ask, str(bundle), SHAPES, QUESTIONS[0])
    assert (done.returncode, done.stdout, link.loads) == (2, "", [])
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_pictures_are_read_before_anything_is_loaded(tools, ask, demo_bundles, tmp_path):
    bundle = demo_bundles["stateful"]
    link = Link(tools, bundle, tmp_path)
    done = link.run(ask, str(bundle), "nowhere.png", QUESTIONS[0])
    assert (done.returncode, link.loads) == (2, [])


def asked(tools, program, bundle, folder, *words):
    """Answers with a folder of their own."""
    folder.mkdir()
    said, link = answers(tools, program, bundle, folder, *words, "--max-tokens", str(MOST))
    return [answer["report"]["tokens"] for answer in said], link


def test_a_size_and_a_context_of_several(tools, ask, exported, tmp_path):
    """A session loads the functions of what it was told, and is what a bundle of these alone is."""
    both = exported(
        size=(SIDE, SIDE), more_sizes=((192, 192),), context=128, more_contexts=(512,)
    )  # fmt: skip
    alone = exported(size=(192, 192), context=512)
    chosen = ["--size", "192", "--context", "512"]
    said, link = asked(tools, ask, both, tmp_path / "both", SHAPES, LONG, *chosen)
    assert (said, len(said[0]) > 0) == (
        asked(tools, ask, alone, tmp_path / "alone", SHAPES, LONG)[0],
        True,
    )
    assert link.loads == [
        ("vision.mlpackage", "main_192x192"),
        ("decoder.mlpackage", "prefill_256_context_512"),
        ("decoder.mlpackage", "prefill_context_512"),
        ("decoder.mlpackage", "decode_context_512"),
    ]
    said, link = asked(tools, ask, both, tmp_path / "first", SHAPES, QUESTIONS[0])
    assert said == [ids for ids, _ in mlx_answers(["shapes.png"], QUESTIONS[:1])]
    assert [function for _, function in link.loads] == ["main", "prefill", "decode"]
    link = Link(tools, both, tmp_path)
    for words, message in (
        (["--context", "7"], "no context of 7; choose one of its own: 128, 512"),
        (["--size", "7"], f"no pictures 7 pixels wide; choose one of its widths: {SIDE}, 192"),
    ):
        done = link.run(ask, str(both), SHAPES, QUESTIONS[0], *words)
        assert (done.returncode, link.loads) == (2, [])
        assert message in done.stderr


WRONG = ("vision.mlpackage", "connector.mlpackage", "decoder.mlpackage")


@pytest.mark.parametrize("package", WRONG)
def test_what_computes_nonsense_on_the_neural_engine_runs_elsewhere(
    tools, ask, exported, tmp_path, package
):
    """By the bundle's trial files; elsewhere they are met. A bundle that is wrong everywhere does
    not run."""
    bundle = exported(verify=True, context=128, fused=False, image_input=False, compute="cpu-ne")
    link = Link(tools, bundle, tmp_path)
    link.wrong = {(package, "cpuAndNeuralEngine")}
    done = link.run(ask, str(bundle), SHAPES, QUESTIONS[0])
    assert done.returncode == 0, done.stderr
    assert link.units[-1][2] == "cpuAndGPU"
    (tmp_path / "cache").rename(tmp_path / "old")
    link.wrong = {(package, units) for units in ("cpuAndNeuralEngine", "cpuAndGPU", "cpuOnly")}
    done = link.run(ask, str(bundle), SHAPES, QUESTIONS[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{package}: its trial is off by " in done.stderr


DESCRIBE, SHAPE, CIRCLES = "Describe the image.", "What shape is it?", "How many circles are there?"
MANY = [DESCRIBE, SHAPE, CIRCLES, SHAPE, SHAPE, CIRCLES, DESCRIBE, SHAPE, CIRCLES]
FEW = 12  # tokens, so that half of the room has a turn and a question


def full(tools, checks, bundle, folder, **more):
    """What a session tells of MANY questions, each with a picture."""
    folder.mkdir()
    link = Link(tools, bundle, folder)
    request = {"ask": "full", "bundle": str(bundle), "picture": SHAPES, "questions": MANY,
               "pictured": [*range(len(MANY))], "most": FEW, **more}  # fmt: skip
    (folder / "requests").write_text(json.dumps([request]))
    done = link.run(checks, str(folder / "requests"))
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("form", ["stateful", "readonly"])
def test_the_oldest_turns_leave_a_context_that_is_full(tools, checks, demo_bundles, tmp_path, form):
    """So many, and the answers to what is left, as in Python's conversations."""
    told = full(tools, checks, demo_bundles[form], tmp_path / "full")
    expected = [*mlx_answers(["shapes.png"], MANY, context=CONTEXT, every=True, max_tokens=FEW)]
    assert [entry["tokens"] for entry in told] == [ids for ids, _ in expected]
    dropped = [*accumulate(entry["reported"] for entry in told)]
    assert dropped == [count for _, count in expected]
    assert 0 < dropped[4] < 4  # at least one of the older turns stays, with its picture
    for number, entry in enumerate(told):
        assert entry.get("dropped", 0) == entry["reported"]
        assert (entry["reused"] == 0) == (entry["reported"] > 0 or number == 0)
        assert entry["turns"] == number + 1 - dropped[number]


def test_a_full_context_that_fails_is_undone_or_has_lost_a_picture(
    tools, checks, demo_bundles, tmp_path
):
    def told(name, **more):
        return full(tools, checks, demo_bundles["stateful"], tmp_path / name, **more)

    plain = told("plain", pictured=[0])
    place, _ = first_dropped(plain)
    assert plain[place - 1]["pictures"] > 0 == plain[place]["pictures"]  # it went with its turn
    # A prediction fails while the turns are run again: the same comes of asking once more.
    failed = told("failed", pictured=[0], fails=place)
    assert "Core ML could not run the decoder" in failed.pop(place)["error"]
    assert failed == plain
    undone = told("undone", pictured=[0], undone=place)
    again = undone.pop(place + 1)
    assert (again["tokens"], again["turns"]) == (plain[place]["tokens"], plain[place]["turns"])
    assert undone == plain
    # A turn whose picture is gone, and those before it, cannot be run again: here the one before
    # the context is full, which would stay.
    for last in range(1, len(MANY)):
        place, count = first_dropped(told(f"pictured-{last}", pictured=[last]))
        if place == last + 1:
            break
    assert count <= last
    lost = told("lost", pictured=[last], forgets=last + 1)
    assert first_dropped(lost) == (last + 1, last + 1)


def first_dropped(told) -> tuple[int, int]:
    """At which question turns left, and how many."""
    return next((n, entry["dropped"]) for n, entry in enumerate(told) if "dropped" in entry)


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_goes_on_behind_what_the_bundle_knows(tools, ask, exported, tmp_path, form):
    """Its prompt cache stands for the first ids of a first turn; an app's own instructions share
    but some of them. In a second conversation it is there again."""
    bundle = exported(verify=True, context=128, **FORMS[form])
    content = json.loads((bundle / "manifest.json").read_text())
    known = content["parts"]["decoder"]["prompt_cache"]["ids"]
    assert known == content["prompt"]["before_image"]
    words = [SHAPES, *QUESTIONS[:2], f"+{QUESTIONS[0]}", "--max-tokens", str(MOST)]
    said, link = answers(tools, ask, bundle, tmp_path, *words)
    expected = [ids for ids, _ in mlx_answers(["shapes.png"], QUESTIONS[:2])]
    assert [answer["report"]["tokens"] for answer in said] == [*expected, expected[0]]
    reports = [answer["report"] for answer in said]
    assert [report["reusedTokens"] == len(known) for report in reports] == [True, False, True]
    assert reports[0]["promptTokens"] == reports[2]["promptTokens"]
    assert link.written == (["keys", "values"] * 2 if form == "stateful" else [])
    other = tmp_path / "other"
    other.mkdir()
    words = [SHAPES, QUESTIONS[0], "--system", "Be brief.", "--max-tokens", str(MOST)]
    (told,), _ = answers(tools, ask, bundle, other, *words)
    assert 0 < told["report"]["reusedTokens"] < len(known)
    total = told["report"]["reusedTokens"] + told["report"]["promptTokens"]
    (tmp_path / "plain").mkdir()
    plain, _ = answers(tools, ask, exported(context=128, **FORMS[form]), tmp_path / "plain", *words)
    assert plain[0]["report"]["promptTokens"] == total
    assert plain[0]["report"]["tokens"] == told["report"]["tokens"]
