"""What a first user tripped over: each was a traceback, a loss or a wrong word before."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_vlm_edge_convert import convert

from mlx_vlm_edge import UsageError, load
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.generation.loop import Options


def refused(arguments, capsys):
    """The one line of a refusal."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_overwrite_never_takes_more_than_a_model(native_folder, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(native_folder, home / "model")
    (home / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="has the source in it"):
        convert(home / "model", home, overwrite=True)
    with pytest.raises(UsageError, match="other things than a model"):
        convert(native_folder, home, overwrite=True)
    assert (home / "notes.txt").read_text() == "keep"
    assert (home / "model" / "config.json").is_file()


def test_overwrite_through_a_link_replaces_what_it_names(native_folder, tmp_path):
    convert(native_folder, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    convert(native_folder, tmp_path / "link", overwrite=True, dtype="bfloat16")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_failed_conversion_leaves_no_folder(native_folder, tmp_path, monkeypatch):
    from mlx_vlm_edge_convert import pipeline

    def fails(*_):
        raise UsageError("no room")

    monkeypatch.setattr(pipeline, "copy_files", fails)
    with pytest.raises(UsageError, match="no room"):
        convert(native_folder, tmp_path / "new" / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_verify_takes_a_quantised_source(native_folder, tmp_path):
    four = convert(native_folder, tmp_path / "four", bits=4, dtype="bfloat16")
    convert(four, tmp_path / "float32", dtype="float32", verify=True)
    lines: list[str] = []
    convert(four, tmp_path / "eight", bits=8, report=lines.append)
    assert any(line.startswith("note: the source has 4 bits already") for line in lines)
    convert(native_folder, tmp_path / "whole", bits=8, report=lines.append)
    assert sum("bits already" in line for line in lines) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 8, "kv_group_size": 0},
        {"kv_group_size": 16},
        {"kv_bits": 7},
        {"max_tokens": "5"},
        {"max_tokens": 2.5},
        {"prefill_step_size": 1.5},
        {"quantized_kv_start": -1},
        {"max_kv_size": 10.5},
        {"stop": None},
    ],
)
def test_options_that_cannot_be(options):
    with pytest.raises(UsageError, match=f"{list(options)[-1]} must be"):
        Options(**options)


@pytest.mark.parametrize("name", ["~nouser/x", "a" * 5000])
def test_names_that_are_no_paths(name, capsys):
    assert "no such folder" in refused(["generate", "--model", name, "-p", "Hi"], capsys)
    assert "no such folder" in refused(["models", "show", name], capsys)
    image = ["generate", "--model", "demo", "-p", "Hi", "--image", name]
    assert ("no such file" if name.startswith("~") else "cannot be read") in refused(image, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models", "pull", "demo"], "bundled"),
        (["models", "rm", "demo"], "bundled"),
        (["generate", "--model", "demo", "-p", "Hi", "--image", ""], "empty"),
        (["generate", "--model", "demo", "-p", "Hi", "--image", "-", "-"], "only once"),
        (["generate", "--model", "demo", "-p", "Hi", "--revision", "x"], "--revision is for"),
    ],
)
def test_requests_that_make_no_sense(arguments, said, capsys):
    assert said in refused(arguments, capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_and_a_closed_input_are_one_line(native_folder):
    command = f"{sys.executable} -m mlx_vlm_edge generate --model {native_folder} --max-tokens 2"
    for line in (f"{command} -p Hi > /dev/full", f"{command} -p - <&-", f"{command} -p Hi >&-"):
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_a_resolution_that_is_no_whole_number():
    with pytest.raises(UsageError, match="resolution must be a whole number"):
        load("demo", resolution=64.0)


def test_both_files_name_ends_of_answers(native_folder, tmp_path):
    folder = shutil.copytree(native_folder, tmp_path / "model")
    before = read_config(folder).get("eos_token_id")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    known = [] if before is None else [before]
    assert read_config(folder)["eos_token_id"] == [*known, *(x for x in (1, 9) if x not in known)]
    assert {1, 9} <= load(str(folder))[1].eos_ids


def test_a_config_nested_too_deep(native_folder, tmp_path):
    folder = shutil.copytree(native_folder, tmp_path / "model")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="not valid JSON"):
        load(str(folder))
