"""What generation_config.json asks for and does not get is told in one line, once."""

import json
import shutil
from pathlib import Path

import pytest

import mlx_vlm_edge
from mlx_vlm_edge import load
from mlx_vlm_edge.loading.unapplied import NEUTRAL, tell_unapplied
from mlx_vlm_edge.wording import say_once

DEMO = Path(mlx_vlm_edge.__file__).parent / "demo"


@pytest.fixture
def told(tmp_path, capsys):
    say_once.cache_clear()

    def of(settings):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        tell_unapplied(tmp_path, {7, 8})
        return capsys.readouterr().err

    return of


@pytest.mark.parametrize(
    "settings",
    [
        {},
        NEUTRAL,
        dict.fromkeys(NEUTRAL),
        {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 50, "eos_token_id": 2},
        {"bad_words_ids": [[7], [8]], "suppress_tokens": [7]},
        {"repetition_penalty": 1},
    ],
)
def test_what_changes_no_greedy_answer_is_not_told(told, settings):
    assert told(settings) == ""


def test_how_to_get_it_is_told_once(told):
    line = told({"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[7, 9]]})
    assert "--repetition-penalty 1.3" in line
    assert "repetition_penalty=1.3" in line
    assert "--repetition-context-size" in line  # the original looks at all of the sequence
    assert "no_repeat_ngram_size (not supported)" in line
    assert "bad_words_ids" in line
    assert line.count("\n") == 1
    again = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[7, 9]]}
    assert told(again) == ""


@pytest.mark.parametrize("value", ["\x1b[2J", {"a": [1]}, [[[]]], True, "x" * 999])
@pytest.mark.parametrize("key", NEUTRAL)
def test_any_value_is_one_plain_line(told, key, value):
    line = told({key: value})
    assert line.count("\n") <= 1
    assert "\x1b" not in line
    assert len(line) < 600


def test_loading_tells_it(tmp_path, capsys):
    say_once.cache_clear()
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    load(str(folder))
    assert capsys.readouterr().err == ""
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.2}')
    load(str(folder))
    assert "--repetition-penalty 1.2" in capsys.readouterr().err
