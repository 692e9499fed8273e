"""Help as a terminal shows it, and the commands that hints name."""

import re
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from mlx_vlm_edge_bench.estimate import costs
from mlx_vlm_edge_convert import quantize

from mlx_vlm_edge import Options, cli
from mlx_vlm_edge.checkpoint.quantization import GROUP_SIZE
from mlx_vlm_edge.checkpoint.weights import DTYPES
from mlx_vlm_edge.cli import convert, flags, serve
from mlx_vlm_edge.generation import disk, drafting, engine, loop, prefix
from mlx_vlm_edge.loading import cost, memory
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.picture.token_budget import METHODS

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


REQUIRED = {"batch": ["a.png", "--prompt", "x", "--output", "x.jsonl"]}


def parser_of(verb):
    parser = cli.Parser(prog=verb)
    import_module(f"mlx_vlm_edge.cli.{verb}").add_arguments(parser)
    return parser


def parsed(verb, *arguments):
    return parser_of(verb).parse_args([*arguments, *REQUIRED.get(verb, [])])


@pytest.mark.parametrize(
    ("verb", "name", "taken"),
    [
        ("convert", "bits", quantize.BITS),
        ("convert", "group_size", quantize.GROUP_SIZES),
        ("convert", "dtype", DTYPES),
        ("estimate", "bits", costs.BITS),
        ("generate", "dtype", DTYPES),
        ("generate", "draft", drafting.DRAFTS[1:]),
    ],
)
def test_a_flag_offers_what_is_taken(verb, name, taken):
    (action,) = (action for action in parser_of(verb)._actions if action.dest == name)
    assert sorted(action.choices) == sorted(taken)


@pytest.mark.parametrize("verb", ["generate", "chat", "batch"])
def test_what_no_flag_says_is_as_in_python(verb):
    """A parser imports nothing that has an option's default, so these are written twice."""
    args = parsed(verb)
    chosen = flags.sampling_options(args)
    assert Options(**{**chosen, "stop": tuple(chosen["stop"])}) == Options()
    assert flags.load_options(args) == LoadOptions()


def test_what_no_flag_says_of_a_server_is_as_in_python():
    args = parsed("serve")
    assert Options(**serve._cache(args)) == Options()
    assert flags.load_options(args) == LoadOptions()
    assert (args.max_rows, args.max_waiting) == (engine.ROWS, engine.WAITING)
    assert parsed("batch").rows == engine.ROWS


def test_flags_of_kv_caches_and_prefill_are_counted_in_memory():
    assert {field.name for field in fields(memory.Caches)} == {*flags.CACHE}
    assert memory.Caches(**{name: getattr(Options(), name) for name in flags.CACHE}) == memory.PLAIN


def test_figures_in_help_and_documents_are_those_of_the_code():
    assert flags.sides("--image-size", parsed("estimate").image_size, "WxH") == cost.SQUARE
    assert convert._GROUP_SIZE == GROUP_SIZE
    first, *others, last = METHODS
    for verb, words in (
        ("estimate", f"the prompt and {memory.ANSWER} more"),
        ("serve", f"up to {disk.MAX_BYTES >> 30} GiB"),
        ("generate", f"{', '.join(map(str, loop.KV_BITS[1:-1]))} or {loop.KV_BITS[-1]} bits"),
        ("generate", f"{first} (the default), {', '.join(others)} or {last}; "),
    ):
        assert words in " ".join(parser_of(verb).format_help().split())
    assert f"`PrefixCache` (up to {prefix.MAX_BYTES >> 20} MiB" in (ROOT / "README.md").read_text()
