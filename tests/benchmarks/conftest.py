"""The scripts in benchmarks/ are no package: their folder joins the path."""

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random one with two decoder layers; the published tower where mlx-vlm is to load it."""
    import random_checkpoint

    published = bool(os.environ.get("MLX_VLM_PYTHON"))
    layers = random_checkpoint.LAYERS if published else (1, 1, 2, 1, 1)
    path = tmp_path_factory.mktemp("random") / "full"
    return random_checkpoint.write(path, bits=4, layers=2, vision_layers=layers, side=192)
