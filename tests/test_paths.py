"""A ~ is home where somebody knows home, and part of a name elsewhere; huggingface_hub agrees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_vlm_edge import paths

from .test_imports import PACKAGES, ROOT

VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
OURS = """
from mlx_vlm_edge.hub.cache import cache_folder
from mlx_vlm_edge.text.mapped_file import path_of
from mlx_vlm_edge_bench.bench import last
from mlx_vlm_edge_convert.coreml.run import cache
print(*(str(path).partition('/.cache/')[0] for path in (
    cache_folder(), path_of('x'), last.file(), cache.folder())))
"""


def test_no_other_file_expands_names():
    own = ROOT / "mlx_vlm_edge" / "paths.py"
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    words = ("expanduser", "expandvars", "Path.home", "XDG_CACHE_HOME")
    found = [path for path in files if any(word in path.read_text() for word in words)]
    assert found == [own]


@pytest.mark.parametrize("name", ["~tmp.png", "./~tmp.png", "~nobody-of-that-name/x.png", "a~b"])
def test_a_tilde_that_is_nobodys_home_is_part_of_the_name(name):
    assert paths.expand(name) == Path(name)


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert paths.expand("~/x.png") == paths.expand(Path("~/x.png")) == Path("/home/ann/x.png")


def test_where_no_home_is_known_nothing_is_raised(tmp_path):
    """A container's user without an entry, and without HOME."""
    nobody = (
        "import os, pwd\n"
        "def unknown(_): raise KeyError\n"
        "pwd.getpwuid = pwd.getpwnam = unknown\n"
        "os.environ.pop('HOME', None)\n"
    )
    ours = ("MLX_VLM_EDGE_CACHE", "MLX_VLM_EDGE_BENCH_FILE")
    named = {*VARIABLES, *ours}
    environment = {name: value for name, value in os.environ.items() if name not in named}
    done = subprocess.run(
        [sys.executable, "-c", nobody + OURS],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["~"] * 4, done.stderr
    assert [*tmp_path.iterdir()] == []


HUBS = """
import importlib, os, sys
import huggingface_hub.constants as theirs
from mlx_vlm_edge.hub.cache import cache_folder
for variable in sys.argv[1:]:
    for value in ("$HOME/hf", "~/hf", "~/${PART}", "$UNSET/hf", "~nobody/hf", "hf"):
        os.environ[variable] = value
        print(variable, value, importlib.reload(theirs).HF_HUB_CACHE, cache_folder())
    del os.environ[variable]
"""


def test_the_hub_cache_is_where_huggingface_hub_has_it():
    environment = {name: old for name, old in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", HUBS, *VARIABLES], capture_output=True, text=True, check=False,
        env=environment | {"HOME": "/home/ann", "PART": "hf"},
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 24, done.stderr
    for variable, value, theirs, ours in lines:
        assert ours == theirs, (variable, value)
    assert lines[0][-1] == "/home/ann/hf"
