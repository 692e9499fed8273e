"""Many generations in one process: same answers, flat memory, no thread and no file left.

MLX_VLM_EDGE_LONG=1 (`make test-long`) makes it 2,000; a short version of it runs otherwise.
"""

import json
import os
import subprocess
import sys

import pytest

from ..demo import ROOT

LONG = bool(os.environ.get("MLX_VLM_EDGE_LONG"))


@pytest.fixture(scope="module")
def told():
    command = ["-m", "tests.tools.long_run", "--generations", "2000" if LONG else "24"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
    print(done.stdout.decode())
    return json.loads(done.stdout)


def test_every_answer_is_the_one_its_question_got_alone(told):
    assert told["generations"] == (2000 if LONG else 24)
    assert told["wrong"] == 0


def test_nothing_is_left_of_earlier_generations(told):
    warm, after = told["warm"], told["after"]
    assert after["mlx"] <= 1.02 * warm["mlx"]
    assert after["files"] == warm["files"]
    assert after["threads"] == warm["threads"]


@pytest.mark.skipif(not LONG, reason="what a process has in memory is flat over long runs only")
def test_memory_is_flat_to_two_per_cent(told):
    assert told["growth"] <= 0.02
