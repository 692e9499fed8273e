"""The batch verb: every picture once, whatever stops it, and only answers of one kind in a file."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
from mlx_vlm_edge_bench import budget

from mlx_vlm_edge import Options
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.generation.batch import Output, Run, share

from ..demo import IMAGES, KNOWN, VISUAL

DESCRIBE = "Describe the image."
NAMES = sorted({row.picture for row in KNOWN})


@pytest.fixture
def batch(capfd, tmp_path):
    """Run the verb on some pictures; (code, the file's lines, what was said)."""
    out = tmp_path / "out.jsonl"

    def run(*arguments, prompts=(DESCRIBE,)):
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        code = main(["batch", *map(str, arguments), *asked, "-o", str(out), "--model", "demo"])
        text = out.read_text() if out.exists() else ""
        return code, [json.loads(line) for line in text.splitlines()], capfd.readouterr()

    run.out = out
    return run


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(IMAGES, folder)
    return folder


def test_a_number_of_visual_tokens_that_no_picture_has_is_refused_once(
    batch, pictures, monkeypatch
):
    monkeypatch.setattr("mlx_vlm_edge.cli.batch._engine", lambda *what: pytest.fail("loaded"))
    code, lines, said = batch(pictures, "--visual-tokens", "300")
    assert (code, lines) == (2, [])
    assert said.err.count("\n") == 1
    assert f"visual tokens 300: the picture has {VISUAL}" in said.err
    assert not batch.out.exists()


def test_a_picture_that_cannot_be_read_is_no_reason_to_refuse_the_others(batch, pictures):
    (pictures / "a.png").write_bytes(b"no picture")
    code, lines, _ = batch(pictures / "a.png", pictures / NAMES[0], "--visual-tokens", "2")
    assert code == 1
    assert [line.get("visual_tokens") for line in lines if "error" not in line] == [2]


def test_each_picture_and_question_has_a_line_with_the_known_answer(batch, pictures):
    known = {(row.picture, row.question): row.answer for row in KNOWN}
    questions = sorted({row.question for row in KNOWN})[:3]
    code, lines, said = batch(pictures, prompts=questions)
    assert code == 0
    assert said.out == ""
    asked = {(os.path.basename(line["image"]), line["prompt"]): line for line in lines}
    assert len(asked) == len(lines) == len(NAMES) * len(questions)
    for key, answer in known.items():
        if key in asked:
            assert asked[key]["answer"] == answer
    line = lines[0]
    assert line["finish_reason"] == "stop"
    assert line["visual_tokens"] == VISUAL
    assert line["seconds"]["prefill"] > 0
    assert f"{len(lines)} answered, 0 failed" in said.err


def test_patterns_files_and_names_from_standard_input(batch, pictures, monkeypatch):
    assert len(batch(pictures / "t*.png", pictures / "text.png")[1]) == 2
    names = f"{pictures / 'hello.png'}\r\n\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    assert len(batch("-")[1]) == 3


def test_a_name_from_standard_input_is_of_any_bytes(batch, pictures, monkeypatch):
    """A Latin-1 name, where files are named so, and a second run that knows it again."""
    name = os.fsdecode(os.fsencode(pictures) + b"/caf\xe9.png")
    shutil.copyfile(pictures / "hello.png", name)
    for _ in range(2):
        stdin = io.TextIOWrapper(io.BytesIO(os.fsencode(name) + b"\n"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        code, lines, _ = batch("-")
        assert code == 0
        assert [line["image"] for line in lines] == [name]


def test_a_second_run_does_what_is_left_and_no_more(batch, pictures):
    _, first, _ = batch(pictures / "text.png")
    _, lines, said = batch(pictures)
    assert lines[0] == first[0]
    assert len(lines) == len(NAMES)
    assert "1 are there already" in said.err
    before = batch.out.read_bytes()
    assert batch(pictures)[0] == 0
    assert batch.out.read_bytes() == before


def test_a_picture_that_cannot_be_read_is_a_line_and_no_end(batch, pictures):
    (pictures / "broken.png").write_bytes(b"no picture")
    code, lines, said = batch(pictures)
    assert code == 1
    assert "failed: " in said.err
    assert "broken.png: not an image" in said.err
    (failed,) = [line for line in lines if "error" in line]
    assert failed["image"].endswith("broken.png")
    assert len(lines) == len(NAMES) + 1
    code, again, said = batch(pictures)
    assert code == 1
    assert again == lines
    assert "1 of them errors (--retry-errors)" in said.err
    shutil.copy(pictures / "text.png", pictures / "broken.png")
    code, lines, _ = batch(pictures, "--retry-errors")
    assert code == 0
    assert len(lines) == len(NAMES) + 2


def test_a_picture_s_name_may_be_no_unicode(tmp_path):
    run, name = Run("demo", ["x"], None, Options()), os.fsdecode(b"\xff.png")
    output = Output(tmp_path / "out.jsonl", run)
    output.write({"image": name, "prompt": "x", "answer": "é"})
    output.close()
    again = Output(tmp_path / "out.jsonl", run)
    assert again.done == {(name, "x")}
    again.close()
    assert "é" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_what_nobody_expected_ends_a_batch_and_is_not_waited_for(batch, pictures, monkeypatch):
    def failing(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr("mlx_vlm_edge.generation.batch.prepare", failing)
    with pytest.raises(RuntimeError, match="no room"):
        batch(pictures)


@pytest.mark.parametrize("more", [
    ["--max-tokens", "3"], ["--system", "Be brief."], ["--bits", "8"], ["--temperature", "1"],
    ["--resolution", "128"],
])  # fmt: skip
def test_a_file_of_another_run_is_refused_and_stays_as_it_was(batch, pictures, more):
    batch(pictures / "text.png")
    before = batch.out.read_bytes()
    code, _, said = batch(pictures, *more)
    assert code == 2
    assert "name another file" in said.err
    assert len(said.err.splitlines()) == 1
    assert batch.out.read_bytes() == before


def test_a_file_knows_the_size_that_a_time_left(batch, pictures, monkeypatch):
    sides = iter([128, 128, 256])
    monkeypatch.setattr(budget, "largest_within", lambda *_: (next(sides), "said"))
    timed = ["--resolution", "auto", "--ttft-budget", "60s"]
    assert batch(pictures / "text.png", *timed)[0] == 0
    assert batch(pictures, *timed)[0] == 0
    code, _, said = batch(pictures, *timed)
    assert code == 2
    assert "name another file" in said.err
    assert next(sides, None) is None, "a size is chosen once a run"


@pytest.mark.parametrize("content", ["a thesis\n", "{}\n", "[1]\n"])
def test_a_file_that_is_none_of_ours_stays_as_it_was(batch, pictures, content):
    batch.out.write_text(content)
    assert main(["batch", str(pictures), "-p", "x", "-o", str(batch.out), "--model", "demo"]) == 2
    assert batch.out.read_text() == content


def test_the_last_half_line_is_repaired(batch, pictures):
    _, lines, _ = batch(pictures)
    whole = batch.out.read_bytes()
    batch.out.write_bytes(whole[:-20])
    _, again, _ = batch(pictures)
    assert sorted(line["image"] for line in again) == sorted(line["image"] for line in lines)


@pytest.mark.parametrize(("arguments", "said"), [
    (["no/such/file.png"], "no such file"), (["--rows", "0", "."], "--rows"),
    (["-p", " ", "."], "--prompt is empty"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_loaded(capfd, tmp_path, arguments, said):
    out = tmp_path / "out.jsonl"
    code = main(["batch", *arguments, "-p", "x", "-o", str(out), "--model", "no/such-model-here"])
    assert code == 2
    assert said in capfd.readouterr().err
    assert not out.exists()


def test_a_schema_and_choices(batch, pictures, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": [{"text": 1}]}')
    _, lines, _ = batch(pictures / "text.png", "--schema", tmp_path / "schema.json")
    assert json.loads(lines[0]["answer"]) == {"text": 1}
    batch.out.unlink()
    _, lines, _ = batch(pictures, "--choices", "red, blue")
    assert {line["answer"] for line in lines} <= {"red", "blue"}


def test_killed_at_any_moment_nothing_is_lost_and_nothing_twice(pictures, tmp_path):
    """kill -9 again and again; every run gets a little further, and the file is always whole."""
    for index in range(6):
        for name in NAMES:
            shutil.copy(pictures / name, pictures / f"{index}-{name}")
    out, total = tmp_path / "out.jsonl", 7 * len(NAMES)
    command = [
        sys.executable, "-m", "mlx_vlm_edge", "batch", str(pictures), "--prompt", DESCRIBE,
        "-o", str(out), "--model", "demo", "--rows", "2",
    ]  # fmt: skip
    seen = 0
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not out.exists() or _lines(out) < seen + 4):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert _lines(out) >= seen
        seen = _lines(out)
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    images = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert len(images) == len(set(images)) == total


def _lines(path):
    return path.read_bytes().count(b"\n")


def test_shares_are_of_content_and_together_are_everything():
    names = [str(index) for index in range(100)]
    shares = [share(names, rank, 3, str.encode) for rank in range(3)]
    assert sorted(chain(*shares)) == sorted(names)
    assert all(20 < len(part) < 50 for part in shares)
    assert share([*names, "new"], 0, 3, str.encode)[: len(shares[0])] == shares[0]


def test_two_processes_share_the_work_over_loopback(pictures, tmp_path):
    launch = "from mlx._distributed_utils.launch import main; main()"  # what mlx.launch runs
    command = [
        sys.executable, "-c", launch, "-n", "2", "--",
        sys.executable, "-m", "mlx_vlm_edge", "batch", str(pictures),
        "--prompt", DESCRIBE, "-o", str(tmp_path / "out.jsonl"), "--model", "demo",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [
        json.loads(line)["image"]
        for rank in range(2)
        for line in (tmp_path / f"out-{rank}-of-2.jsonl").read_text().splitlines()
    ]
    assert sorted(os.path.basename(name) for name in lines) == NAMES, done.stderr
