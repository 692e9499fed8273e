"""Verbs and flags of other tools: taken where they mean the same, else answered with the right one.

The lists are mlx-vlm 0.6.15's `generate --help` and ollama's verbs.
"""

import json
import re

import pytest
from PIL import Image

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.cli import available, habits, main
from mlx_vlm_edge.hub import models
from mlx_vlm_edge.loading import memory


@pytest.fixture
def cli(capfd):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("mlx-vlm-edge: error: ")
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize(
    ("verb", "meant"),
    [
        ("run", "chat --model"), ("pull", "models pull"), ("list", "models list"),
        ("ls", "models list"), ("rm", "models rm"), ("show", "models show"),
        ("quantize", "convert"), ("generte", "generate"), ("model", "models"), ("serv", "serve"),
        ("pul", "models pull"),
    ],
)  # fmt: skip
def test_a_verb_of_another_tool_is_answered_with_ours(cli, verb, meant):
    refused(cli(verb, "smolvlm-256m"), f"no verb '{verb}'", f"`mlx-vlm-edge {meant}")


def test_a_verb_like_none_gets_the_list(cli):
    refused(cli("xyzzy"), "the verbs are generate, chat")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "--promt", "Why?"), "did you mean --prompt?"),
        (("generate", "Why?", "--max_tokens=5"), "did you mean --max-tokens?"),
        (("generate", "Why?", "--trust-remote-code"), "no code of a checkpoint is ever run"),
        (("generate", "Why?", "--max-new-tokens", "5"), "it is --max-tokens"),
        (("batch", ".", "--promt", "Why?", "-o", "x"), "did you mean --prompt?"),
        (("models", "list", "--jsn"), "did you mean --json?"),
        (("models", "--jsn"), "required: list | pull"),
        (("generate", "Why?", "--zzzz"), "unrecognized arguments: --zzzz (see"),
    ],
)
def test_a_flag_that_is_near_is_named(cli, arguments, said):
    refused(cli(*arguments), said)


def test_what_follows_a_flag_may_look_like_one(cli, native_folder):
    code, out, _ = cli("generate", "-m", native_folder, "--max-tokens", 1, "--prompt=--promt")
    assert code == 0
    assert out


def test_the_question_stands_alone_or_behind_its_flag(cli, native_folder):
    rest = ("-m", native_folder, "--max-tokens", 4)
    want = cli("generate", "--prompt", "What is this?", *rest)
    assert want[0] == 0
    assert cli("generate", "What is this?", *rest) == want
    assert cli("generate", *rest, "What is this?") == want


def test_no_question_or_two(cli, tmp_path):
    refused(cli("generate", "One?", "-p", "Two?"), "there twice")
    refused(cli("generate"), "no question", "--prompt")
    refused(cli("generate", "--image", "x.png", "What is it?"), "'What is it?' was taken")


def test_the_system_prompt_has_two_flags(cli, native_folder):
    rest = ("-m", native_folder, "--max-tokens", 4)
    want = cli("generate", "Why?", "--system", "Be brief.", *rest)
    assert cli("generate", "Why?", "--system-prompt", "Be brief.", *rest) == want
    assert want[1] != cli("generate", "Why?", *rest)[1]


def test_eos_tokens_end_an_answer(cli, native_folder):
    rest = ("-m", native_folder, "--max-tokens", 6)
    whole = cli("generate", "Why?", *rest)[1].rstrip("\n")
    last = whole[len(whole) // 2 :].strip()[0]
    cut = cli("generate", "Why?", *rest, "--eos-tokens", last, "@@")[1].rstrip("\n")
    assert cut == whole[: whole.index(last)]


def test_resize_shape_is_the_resolution(cli, native_folder, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    ask = ("generate", "Why?", "--image", tmp_path / "picture.png", "-m", native_folder,
           "--max-tokens", 2)  # fmt: skip
    want = cli(*ask, "--resolution", 128)
    for sides in ((128,), (128, 128)):
        code, out, err = cli(*ask, "--resize-shape", *sides)
        assert (code, out) == want[:2]
        assert err == "note: --resize-shape is --resolution 128 here\n"
    refused(cli(*ask, "--resize-shape", 336, 224), "--resolution", "336")
    refused(cli(*ask, "--resolution", 64, "--resize-shape", 128), "leave one of them out")


def test_a_model_has_a_short_flag_in_every_verb():
    import importlib

    from mlx_vlm_edge.cli import VERBS, Parser

    for verb in VERBS:
        parser = Parser(prog=verb)
        importlib.import_module(f"mlx_vlm_edge.cli.{verb}").add_arguments(parser)
        flags = parser._option_string_actions
        assert ("--model" in flags) == ("-m" in flags), verb


def test_what_is_available(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    wanted = {name: models.ALIASES[name] for name in ("fastvlm-0.5b", "eve-7b-hd-v2")}
    monkeypatch.setattr(available, "ALIASES", wanted)
    code, out, _ = cli("models", "list", "--available", "--json")
    assert code == 0
    small, large = json.loads(out)
    assert small["licence"] == "apple-amlr"
    assert large["licence"] is None
    assert small["bytes"] == 1_240_488_768
    assert small["here"] is False
    monkeypatch.setattr(memory, "usable", lambda: (small["memory"] + large["memory"]) // 2)
    code, out, err = cli("models", "list", "--available")
    rows = out.splitlines()
    assert (code, len(rows)) == (0, 3)
    assert "1.24 GB" in rows[1]
    assert "not fit" not in rows[1]
    assert re.search(r"not known +does not fit here$", rows[2])
    starts = {
        row.index(word) for row, word in zip(rows, ("licence", "apple", "not known"), strict=True)
    }
    assert len(starts) == 1  # the names' own widths make the columns
    assert "publisher's word" in err


def test_every_alias_has_its_licence_looked_up():
    for alias in models.ALIASES:
        licence = configs.licence(alias)
        assert licence is None or licence == licence.lower()


def test_ls_lists(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cli("models", "ls", "--json") == cli("models", "list", "--json")


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        (["--context", "1024", "4096", "x"], ["--context", "1024,4096", "x"]),
        (["--image-size", "512", "768x512", "1024"], ["--image-size", "512,768x512,1024"]),
        (["--image-size", "512,640", "1024"], ["--image-size", "512,640,1024"]),
        (["--context", "1024", "demo", "4096"], ["--context", "1024", "demo", "4096"]),
        (["--context", "many", "4096"], ["--context", "many", "4096"]),
        (["--bits", "4", "8"], ["--bits", "4", "8"]),
        (["--context"], ["--context"]),
    ],
)
def test_numbers_behind_a_flag_of_several_are_one_word(typed, taken):
    assert habits.joined(typed, ["--context", "--image-size"]) == taken
