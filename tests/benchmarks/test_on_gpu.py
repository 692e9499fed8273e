"""The script for a machine with a GPU, its programs replaced by one that writes down its words."""

import subprocess
from pathlib import Path

import pytest
from rows import rows

from mlx_vlm_edge.cli import Parser, bench, doctor

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_gpu.sh"
PROGRAM = """#!/bin/sh
echo "$@" >> "{log}"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
case "$*" in *"{failing}"*) echo "it went wrong"; exit 1;; esac
for word in "$@"; do case "$word" in *.json) echo "{{}}" > "$word";; esac; done
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    def start(*words, failing="nothing of the kind"):
        log, program = tmp_path / "words", tmp_path / "python"
        program.write_text(PROGRAM.format(log=log, failing=failing))
        program.chmod(0o755)
        monkeypatch.setenv("PYTHON", str(program))
        done = subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True)
        return done, log.read_text().splitlines() if log.exists() else []

    return start


def test_all_steps_are_done_by_commands_that_are_understood(run, tmp_path):
    done, words = run(str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    whole = "\n".join(words)
    for step in ("mlx-vlm==0.7.10", "doctor --selftest", "pytest", "against_mlx_vlm.py", "report"):
        assert step in whole
    for line in words:
        if line.startswith("-m mlx_vlm_edge "):
            verb, *flags = line.removeprefix("-m mlx_vlm_edge ").split()
            parser = Parser()
            {"bench": bench, "doctor": doctor}[verb].add_arguments(parser)
            parser.parse_args(flags)
    compared = next(line for line in words if "against_mlx_vlm.py" in line)
    chosen = compared.split("--rows ")[1].split(" --")[0].split()
    assert set(chosen) <= {row.id for row in rows(Path("a"), Path("b"))}


def test_a_step_that_fails_is_told_and_the_others_are_tried(run, tmp_path):
    done, words = run(str(tmp_path / "out"), "jpeg", failing="-m pytest")
    assert done.returncode == 1
    assert "it went wrong" in done.stdout
    assert any("--rows jpeg --json" in line for line in words)
    assert "it went wrong" in (tmp_path / "out" / "tests.log").read_text()


def test_without_a_gpu_nothing_is_measured(run, tmp_path):
    done, words = run(str(tmp_path / "out"), failing="default_device")
    assert done.returncode == 1
    assert not any("against" in line for line in words)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_it_says_how_it_is_called(run, words):
    done, _ = run(*words)
    assert (done.returncode, done.stderr.startswith("usage: ")) == (2, True)
