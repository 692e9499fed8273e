"""Kills a command for a test: at a sample of points, or at all with MLX_VLM_EDGE_KILLS=all."""

import json
import os
import subprocess
import sys

from .commands import ROOT


def interrupted(command: str) -> dict[str, object]:
    """What killing a command again and again came to."""
    every = ["--all"] if os.environ.get("MLX_VLM_EDGE_KILLS") == "all" else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.interruption", command, *every],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
