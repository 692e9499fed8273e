"""The `generate` verb: what it prints where, its exit codes, and one line for every mistake."""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from argparse import Namespace

import pytest
from PIL import Image

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.cli import chat, main
from mlx_vlm_edge.cli import generate as verb
from mlx_vlm_edge.generation import drafting
from mlx_vlm_edge.loading import load as loading


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory):
    from ..reference.fastvlm import picture

    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(picture(1)).save(path)
    return path


@pytest.fixture
def generate(native_folder, capfd):
    """Run `generate` in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments, prompt="What is this?", model=native_folder):
        prompted = [] if prompt is None else ["--prompt", prompt]
        given = [] if model is None else ["--model", model]
        code = main([str(a) for a in ("generate", *given, *prompted, *arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def answer(folder, *arguments, **options):
    pieces = list(stream_generate(*load(str(folder)), *arguments, **options))
    return "".join(piece.text for piece in pieces)


def refused(result, *words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("mlx-vlm-edge: error: ")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err, err


def test_the_answer_goes_to_stdout_and_nothing_else(generate, native_folder, picture_file):
    code, out, err = generate("--image", picture_file, "--max-tokens", 8)
    want = answer(native_folder, "What is this?", images=[str(picture_file)], max_tokens=8)
    assert (code, out, err) == (0, want + "\n", "")


def test_several_images(generate, native_folder, picture_file):
    want = answer(native_folder, "What is this?", images=[str(picture_file)] * 2, max_tokens=4)
    options = ("--max-tokens", 4)
    assert generate("--image", picture_file, picture_file, *options)[1] == want + "\n"
    assert generate("--image", picture_file, "--image", picture_file, *options)[1] == want + "\n"


def test_text_only(generate, native_folder):
    want = answer(native_folder, "What is this?", max_tokens=5)
    assert generate("--max-tokens", 5)[1] == want + "\n"


def test_the_prompt_from_standard_input(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is this?")))
    assert generate("--max-tokens", 5, prompt="-")[1] == generate("--max-tokens", 5)[1]


@pytest.mark.parametrize(("sent", "raw", "asked"), [
    ("What?\n", False, "What?"), ("What?\r\n", False, "What?"), ("What?\n\n", False, "What?\n"),
    (" What?\r", False, " What?\r"), ("What?\n", True, "What?\n"), ("What?\r\n", True, "What?\r\n"),
])  # fmt: skip
def test_a_piped_question_has_no_end_of_line(monkeypatch, sent, raw, asked):
    """`echo "What?" | generate -` is the question that `generate "What?"` is."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent.encode())))
    assert verb._from_arguments(from_standard_input(raw)) == (asked, [])


def from_standard_input(raw=False):
    return Namespace(prompt="-", question=None, image=[], page=[], raw=raw)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_question_is_utf8_in_any_locale(encoding, monkeypatch):
    text = "Für wen\r\nist das ☃?"
    for read in (chat._piped, lambda: verb._from_arguments(from_standard_input())[0]):
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding=encoding)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read() == text


def test_an_image_from_standard_input(generate, monkeypatch, picture_file):
    want = generate("--image", picture_file, "--max-tokens", 5)
    stdin = io.TextIOWrapper(io.BytesIO(picture_file.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate("--image", "-", "--max-tokens", 5) == want


def test_a_terminal_is_not_waited_for(generate, monkeypatch, picture_file):
    stdin = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert "pipe or redirect" in generate("--image", "-")[2]


def test_pages_of_a_pdf(generate, tmp_path, picture_file):
    pytest.importorskip("pypdfium2", reason="PDF pages need pypdfium2 (the `pdf` extra)")
    path = tmp_path / "two.pdf"
    sheets = [Image.new("RGB", (200, 100), color) for color in ("red", "blue")]
    sheets[0].save(path, save_all=True, append_images=sheets[1:])
    said = json.loads(generate("--image", path, "--page", 2, 1, "--json", "--max-tokens", 1)[1])
    both = generate("--image", picture_file, picture_file, "--json", "--max-tokens", 1)[1]
    assert said["visual_tokens"] == json.loads(both)["visual_tokens"]
    assert "generate --page N" in generate("--image", path)[2]
    assert "--page is for PDFs" in generate("--image", picture_file, "--page", 1)[2]


def test_a_resolution_beyond_any_model(generate, picture_file):
    code, out, err = generate("--image", picture_file, "--resolution", 1_000_000)
    assert (code, out) == (2, "")
    assert "give at most 8,192 pixels" in err


def test_raw(generate, native_folder, picture_file):
    options = {"images": [str(picture_file)], "raw": True, "max_tokens": 5}
    want = answer(native_folder, "a <image> b", **options)
    result = generate("--image", picture_file, "--raw", "--max-tokens", 5, prompt="a <image> b")
    assert result[1] == want + "\n"


def test_a_system_prompt_changes_the_prompt(generate):
    plain, other = (
        json.loads(generate("--json", "--max-tokens", 1, *extra)[1])["prompt_tokens"]
        for extra in ((), ("--system", "Answer in one word, and in English only."))
    )
    assert other > plain


def test_json(generate, native_folder, picture_file):
    code, out, err = generate("--image", picture_file, "--max-tokens", 4, "--json")
    whole = json.loads(out)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    want = answer(native_folder, "What is this?", images=[str(picture_file)], max_tokens=4)
    assert whole["text"] == want
    assert len(whole["tokens"]) == 4
    assert "token" not in whole
    assert whole["visual_tokens"] == 9
    assert whole["finish_reason"] in ("stop", "length")
    assert whole["ttft_e2e"] > 0


COLD = ["start", "imports", "weights", "tokenizer", "picture", "prompt"]


@pytest.mark.parametrize(
    ("more", "parts"),
    [((), ["first token"]), (("--verbose",), ["vision", "prefill", "first token"])],
    ids=["nothing waited for", "each stage waited for"],
)
def test_json_says_what_a_cold_start_is_made_of(generate, picture_file, more, parts):
    _, out, _ = generate("--image", picture_file, "--max-tokens", 2, "--json", *more)
    whole = json.loads(out)
    assert list(whole["cold"]) == COLD + parts
    assert sum(whole["cold"].values()) == pytest.approx(whole["ttft_cold"])
    assert min(whole["cold"].values()) >= 0
    assert whole["ttft_cold"] > whole["ttft_e2e"]


def test_verbose_goes_to_stderr(generate, picture_file):
    _, out, err = generate("--image", picture_file, "--max-tokens", 4, "--verbose")
    assert out == generate("--image", picture_file, "--max-tokens", 4)[1]
    for stage in ("image decode", "preprocess", "vision", "connector", "prefill", "first sample"):
        assert stage in err
    assert "ttft_e2e" in err
    assert "peak memory" in err


def test_the_model_from_the_environment(generate, native_folder, monkeypatch):
    want = generate("--max-tokens", 4)
    monkeypatch.setenv("MLX_VLM_EDGE_MODEL", str(native_folder))
    assert generate("--max-tokens", 4, model=None) == want


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_at_load(generate, bits):
    code, out, _ = generate("--bits", bits, "--max-tokens", 4)
    assert code == 0
    assert out.endswith("\n")


# Mistakes of a user: one line, exit code 2.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "the question is empty"),
        (["--prompt", " \n"], "the question is empty"),
        (["--raw", "--prompt", ""], "the question is empty"),
        (["--top-p", "2"], "top_p"),
        (["--stop", ""], "stop string must not be empty"),
        (["--kv-bits", "7"], "kv_bits"),
        (["--vision-backend", "other"], "vision back end 'other'"),
        (["--resolution", "1000000"], "image size 1,000,000"),
        (["--max-tiles", "0"], "max_tiles must be"),
        (["--image", "/no/such.png"], "no such file"),
        (["--image", __file__], "not an image"),
        (["--video", "/no/such.gif"], "no such file"),
        (["--fps", "2"], "--fps is for videos"),
        (["--image", "data:image/png;base64,AAAA"], "not an image"),
        (["--offline", "--image", "http://127.0.0.1:9/a.png"], "nothing is fetched offline"),
        (["--image", "http://127.0.0.1:9/a.png"], "cannot be fetched"),
        (["--system", "x", "--raw"], "--raw takes the prompt as it stands"),
    ],
)
def test_mistakes_are_told_before_a_model_is_looked_for(generate, monkeypatch, arguments, words):
    """So that nothing is downloaded or read, and the process ends at once."""
    monkeypatch.setattr(loading, "obtain", lambda *_, **__: pytest.fail("looked for a model"))
    prompt = None if "--prompt" in arguments else "Hi"
    refused(generate(*arguments, prompt=prompt), words)


def test_an_address_is_fetched_once_and_its_header_looked_at(generate, monkeypatch, picture_file):
    fetched = []

    def fetch(address, name):
        fetched.append(address)
        return picture_file.read_bytes()

    monkeypatch.setattr("mlx_vlm_edge.picture.fetch.download", fetch)
    answer = generate("--image", "http://example.com/a.png", "--max-tokens", 3)
    assert answer == generate("--image", picture_file, "--max-tokens", 3)
    assert fetched == ["http://example.com/a.png"]


@pytest.fixture
def bad_image(tmp_path, picture_file):
    """A path to an image of the named kind of badness."""

    def make(kind):
        path = tmp_path / f"{kind}.png"
        data = picture_file.read_bytes()
        if kind == "text":
            path.write_text("this is no picture")
        elif kind == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "directory":
            path.mkdir()
        elif kind == "huge":
            path.write_bytes(_huge_png(50_000))
        return path

    return make


def _huge_png(side):
    """A PNG whose header says side x side pixels, with almost nothing behind it."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "directory", "huge", "missing"])
def test_a_bad_image(generate, bad_image, kind):
    path = bad_image(kind)
    refused(generate("--image", path), path.name)


def test_a_bad_image_on_standard_input(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no picture")))
    refused(generate("--image", "-"))


def test_nothing_on_standard_input_for_two(generate):
    refused(generate("--image", "-", prompt="-"), "standard input")


def test_an_unknown_model(generate):
    refused(generate(model="no-such-model"), "no-such-model")


def test_a_model_that_is_not_here_and_no_network(generate, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refused(generate("--offline", model="apple/FastVLM-7B"), "apple/FastVLM-7B")


def test_a_folder_without_a_config(generate, tmp_path):
    refused(generate(model=tmp_path), tmp_path, "config.json")


def test_truncated_weights(generate, native_folder, tmp_path):
    for source in native_folder.iterdir():
        data = source.read_bytes()
        cut = len(data) // 2 if source.suffix == ".safetensors" else len(data)
        (tmp_path / source.name).write_bytes(data[:cut])
    refused(generate(model=tmp_path), "model.safetensors")


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_wrong_weights(generate, native_weights, tmp_path, fault):
    from ..reference import native

    name, weights = "mm_projector.2.bias", dict(native_weights)
    array = weights.pop(name)
    if fault != "missing":
        weights[name if fault == "misshapen" else "mm_projector.4.bias"] = array[:3]
    if fault == "extra":
        weights[name] = array
    folder = native.save(weights, native.config(), tmp_path)
    refused(generate(model=folder), "mm_projector")


class Payload:
    """What a malicious pickle does: call something when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_malicious_pickle(generate, hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "evil")
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Payload(tmp_path / "ran")}))
    refused(generate(model=folder), "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_more_images_than_markers(generate, picture_file):
    result = generate("--image", picture_file, picture_file, "--raw", prompt="one <image>")
    refused(result, "1", "2")


def test_a_prompt_longer_than_the_context(generate):
    refused(generate(prompt="a b " * 600), "context")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--temperature", "-1"),
        ("--temperature", "hot"),
        ("--max-tokens", "0"),
        ("--top-p", "7"),
        ("--dtype", "int3"),
        ("--no-such-flag",),
        ("--resolution", "100"),
        ("--kv-bits", "5"),
        ("--max-kv-size", "2"),
    ],
)
def test_bad_options(generate, arguments):
    refused(generate(*arguments))


def test_a_cache_in_groups_that_fit_no_head(generate):
    """The tiny model's heads have 16 values; found out before anything is printed."""
    refused(generate("--kv-bits", "8"), "--kv-group-size")


def test_a_prompt_that_is_no_text(generate, monkeypatch):
    refused(generate(prompt="a\udcffb"), "UTF-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe hi")))
    refused(generate(prompt="-"), "UTF-8")


def test_no_prompt(generate):
    refused(generate(prompt=None), "--prompt")


def test_an_unknown_verb(capfd):
    code = main(["genrate"])
    refused((code, *capfd.readouterr()), "genrate")


def test_control_c_ends_with_what_there_is(generate, monkeypatch):
    from mlx_vlm_edge.models.fastvlm import Model

    steps = []

    def step(self, token, cache, original=Model.step):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self, token, cache)

    whole = generate("--max-tokens", 10)[1]
    monkeypatch.setattr(Model, "step", step)
    code, out, err = generate("--max-tokens", 10)
    assert code == 130
    assert whole.startswith(out.rstrip("\n"))
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback(native_folder):
    """mlx-vlm-edge generate ... | head -c 0"""
    import subprocess

    command = [sys.executable, "-m", "mlx_vlm_edge", "generate", "--model", str(native_folder)]
    process = subprocess.Popen(
        [*command, "--prompt", "Hi", "--max-tokens", "40"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


def test_a_terminal_that_cannot_show_the_answer(native_folder):
    import subprocess

    command = [sys.executable, "-m", "mlx_vlm_edge", "generate", "--model", str(native_folder)]
    done = subprocess.run(
        [*command, "--prompt", "Hi", "--max-tokens", "20"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_and_version(capfd, arguments):
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    out, err = capfd.readouterr()
    assert code == 0
    assert err == ""
    assert out


def test_no_arguments_shows_the_help(capfd):
    assert main([]) == 2
    out, err = capfd.readouterr()
    assert "generate" in out + err


def test_drafts_change_no_answer_and_are_counted(generate, monkeypatch):
    monkeypatch.setattr(drafting, "_measured", lambda model: dict.fromkeys(drafting.LENGTHS, 1.0))
    _, plain, _ = generate("--max-tokens", 40, "--json")
    _, drafted, err = generate("--max-tokens", 40, "--json", "--draft", "prompt-lookup")
    want, got = json.loads(plain), json.loads(drafted)
    assert (got["text"], got["tokens"]) == (want["text"], want["tokens"])
    assert got["drafted_tokens"] >= got["accepted_tokens"] >= want["drafted_tokens"] == 0
    _, _, err = generate("--max-tokens", 4, "--verbose", "--draft", "prompt-lookup")
    assert "drafts: 0 of 0 tokens were right" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("eagle",), ("--draft",)), (("prompt-lookup", "--max-kv-size", 64), ("max_kv_size",))],
)
def test_drafts_that_cannot_be(generate, flags, words):
    refused(generate("--draft", *flags), *words)
