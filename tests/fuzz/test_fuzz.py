"""A little of `make fuzz`, in a process of its own, and that the harness sees what it looks for."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_vlm_edge.errors import UsageError

from .harness import Inputs, run

ROOT = Path(__file__).parents[2]
# Inputs a class, a minute of them together on two cores.
COUNTS = {
    "pictures": 250, "configs": 400, "models": 60, "safetensors": 500, "bundles": 300,
    "torch zips and pickles": 500, "tokenizers": 120, "chat templates": 400, "prompts": 200,
    "messages": 900, "addresses": 200, "Hub answers": 300,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_spoiled_inputs_are_refused_in_a_line_or_right(name):
    command = [sys.executable, "-m", "tests.fuzz", "--only", name, "--total", str(COUNTS[name])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{COUNTS[name]} inputs, 0 faults" in done.stdout


def tried(attempt):
    tally = run(Inputs("planted", lambda _: attempt), range(1))
    return tally.faults[0][1] if tally.faults else tally


def test_the_harness_sees_faults(tmp_path, monkeypatch):
    def refused(_):
        raise UsageError("no")

    def traceback(_):
        raise KeyError("x")

    def program(_):
        subprocess.run(["true"], check=True)

    def swallowed(_):
        try:
            program(_)
        except BaseException:  # noqa: BLE001  (as a net may do it)
            raise UsageError("hidden") from None

    def outside(_):
        (tmp_path / "x").write_text("")

    def spinning(_):
        while True:
            time.process_time()

    assert tried(lambda _: None).right == 1
    assert tried(refused).refused == 1
    assert "KeyError at test_fuzz.py" in tried(traceback)
    assert "subprocess.Popen" in tried(program)
    assert "subprocess.Popen" in tried(swallowed)
    assert "wrote" in tried(outside)
    monkeypatch.setattr("tests.fuzz.harness.SECONDS", 0.05)
    assert "took more than" in tried(spinning)


def test_an_input_is_the_same_by_its_number():
    seen = []
    kind = Inputs("same", lambda _: lambda rng: seen.append(rng.random()))
    run(kind, range(3))
    run(kind, range(2, 3))
    assert seen[2] == seen[3]
    assert len(set(seen)) == 3
