"""The scripts in benchmarks/ are no package: their folder joins the path."""

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small random one; the published one where mlx-vlm is to load it, which builds no other."""
    import random_checkpoint

    published = bool(os.environ.get("MLX_VLM_PYTHON"))
    tower = random_checkpoint.LAYERS if published else (1, 1, 2, 1, 1)
    layers = random_checkpoint.TEXT["num_hidden_layers"] if published else 2
    path = tmp_path_factory.mktemp("random") / "full"
    return random_checkpoint.write(path, bits=4, layers=layers, vision_layers=tower, side=192)
