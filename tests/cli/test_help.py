"""Help as a terminal shows it, and the commands that hints name."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from mlx_vlm_edge import cli

ROOT = Path(__file__).parents[2]
SOURCES = ("mlx_vlm_edge", "convert", "benchmarks/mlx_vlm_edge_bench")


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_is_no_wider_than_the_terminal(verb, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = cli.Parser(prog=f"mlx-vlm-edge {verb}")
    import_module(f"mlx_vlm_edge.cli.{verb}").add_arguments(parser)
    lines = parser.format_help().split("\n\n", 1)[1].splitlines()  # usage: is one line of ours
    assert max(map(len, lines)) <= min(columns, 100)


def test_the_list_of_verbs_fits_into_80_columns():
    assert max(map(len, cli._help().splitlines())) <= 80


def test_hints_name_packages_that_pypi_has():
    """This package is not on PyPI: what its extras ask for is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(item for extra in extras for item in extra)]
    known = {re.match(r"[\w-]+", item)[0].replace("_", "-") for item in listed}
    hints = {}
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for words in re.findall(r"pip install ([\w' =.\[\]-]+)", path.read_text()):
                hints[path.name] = [word.strip("'") for word in words.split()]
    assert len(hints) >= 8
    for name, words in hints.items():
        packages = {re.split("[=.[]", word)[0].replace("_", "-") for word in words
                    if not word.startswith("-")}  # fmt: skip
        assert packages - {""} <= known - {"mlx-vlm-edge"}, name
