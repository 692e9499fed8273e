"""What the documents tell a reader to type: it parses, it runs, and its links lead somewhere."""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.cli import VERBS, Parser
from mlx_vlm_edge.cli.models import PICTURES as ORDINARY
from mlx_vlm_edge.hub.models import DEMO
from mlx_vlm_edge.loading import cost

from .demo import KNOWN, ROOT

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "examples", "benchmarks", "mlx_vlm_edge", "tests")
      for path in sorted((ROOT / folder).rglob("*.md"))),
]  # fmt: skip
WORKFLOW = ROOT / ".github" / "workflows" / "macos.yml"
TROUBLES = ROOT / "docs" / "troubleshooting.md"
PICTURES = ("photo.jpg", "before.jpg", "after.jpg")


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a document in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def workflow_steps() -> list[dict[str, Any]]:
    """What the macOS workflow does, step by step."""
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    return job["steps"]


def commands(program: str) -> list[str]:
    """The lines of the documents' shell blocks, and of the workflow, that run this program."""
    shell = [block for path in DOCUMENTS for block in blocks(path, "bash", "", "sh")]
    shell += [step["run"] for step in workflow_steps() if "run" in step]
    lines = [line.strip() for block in shell for line in block.splitlines()]
    lines = [re.split(r" (?:2>&1 )?[|&<>]", line)[0] for line in lines]
    return sorted({line for line in lines if line.startswith(f"{program} ")})


@pytest.fixture
def pictures(tmp_path):
    for index, name in enumerate(PICTURES):
        Image.new("RGB", (192, 160), (80 * index, 120, 40)).save(tmp_path / name)
    return tmp_path


def test_there_are_commands_to_check():
    assert len(commands("mlx-vlm-edge")) > 2
    assert len(commands("python")) > 2


@pytest.mark.parametrize("command", commands("mlx-vlm-edge"))
def test_a_command_parses(command):
    _, verb, *arguments = shlex.split(command, comments=True)
    parser = Parser(prog=verb)
    import_module(f"mlx_vlm_edge.cli.{verb}").add_arguments(parser)
    parser.parse_args(arguments)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {name for path in DOCUMENTS for name in re.findall(r"`make ([\w-]+)", path.read_text())}
    assert asked
    assert asked <= targets


@pytest.mark.parametrize("command", commands("python"))
def test_a_script_is_there_and_has_these_options(command):
    script, *arguments = shlex.split(command, comments=True)[1:]
    if script == "-c":
        compile(arguments[0], "<command>", "exec")
        return
    if script == "-m":
        assert find_spec(arguments[0])
        return
    source = (ROOT / script).read_text()
    flags = [argument for argument in arguments if argument.startswith("--")]
    assert [flag for flag in flags if f'"{flag}"' not in source] == []


def test_the_workflow_uses_what_is_there_and_keeps_what_it_saw():
    steps = workflow_steps()
    assert all(("run" in step) != ("uses" in step) for step in steps)
    script = "\n".join(step.get("run", "") for step in steps)
    named = re.findall(r"(?:examples|benchmarks|tests)/[\w./-]+", script)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    for verb in ("generate", "export", "bench"):
        assert f"mlx-vlm-edge {verb} " in script
    written = set(re.findall(r"(?:tee(?: -a)?|--json|--junitxml) ([\w./-]+)", script))
    assert written
    assert all(name.startswith("results/") for name in written), written
    assert steps[-1]["if"] == "${{ always() }}"
    assert steps[-1]["with"]["path"] == "results"


def test_the_python_names_in_the_documents_exist():
    texts = [path.read_text() for path in DOCUMENTS]
    named = {name for text in texts for name in re.findall(r"`(mlx_vlm_edge\w*(?:\.\w+)+)`", text)}
    assert named
    for name in named:
        module, _, leaf = name.rpartition(".")
        assert hasattr(import_module(module), leaf) or find_spec(name), name


def test_every_extra_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [path.read_text() for path in (*DOCUMENTS, WORKFLOW)]
    asked = {name for text in texts for name in re.findall(r"(?:\.|edge)\[([\w,]+)\]['\"]", text)}
    assert asked
    assert {name for names in asked for name in names.split(",")} <= {
        *extras["optional-dependencies"]
    }


def anchors(path: Path) -> set[str]:
    """What a link may name after its #: the headings as a browser of the repository spells them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    wrong = []
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("path", [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"])
def test_the_files_that_the_map_names_are_there(path):
    """`folder/file.py` from the root or a package's; <family> is for the reader to fill in."""
    named = re.findall(r"`([\w<>./-]+/[\w<>.-]*)`", path.read_text())
    roots = [ROOT, *(ROOT / name for name in ("mlx_vlm_edge", "convert", "benchmarks"))]
    assert named
    assert [name for name in named if "<" not in name
            and not any((root / name).exists() for root in roots)] == []  # fmt: skip


def test_no_answer_of_the_demo_model_is_quoted():
    """They stand in tests/golden/demo_answers.json, which a newly trained model writes anew."""
    answers = {row.answer for row in KNOWN if " " in row.answer}
    assert answers
    folders = ("docs", "examples", "tests", "benchmarks", "mlx_vlm_edge", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")
             if path.suffix in {".md", ".py", ".swift", ".yml"}]  # fmt: skip
    texts = {path: path.read_text() for path in [*files, *ROOT.glob("*.md")]}
    assert [path for path, text in texts.items() if any(said in text for said in answers)] == []


def test_the_demo_s_figures_are_the_recorded_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo_model"))
    import record

    figures = record.figures(json.loads(record.EVALUATION.read_text()))
    for path in record.READMES:
        assert record.put(path.read_text(), figures) == path.read_text(), path


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/python.md"])
def test_the_python_of_a_document_runs(native_folder, pictures, monkeypatch, capsys, name):
    """With the tiny model and small pictures in the place of the real ones."""
    monkeypatch.chdir(pictures)
    code = "\n".join(blocks(ROOT / name, "python"))
    assert re.search(r'load\("(fastvlm-0.5b|demo)"\)', code)
    exec(re.sub(r'"(fastvlm-0.5b|demo)"', repr(str(native_folder)), code), {})
    assert capsys.readouterr().out


def test_the_errors_that_troubleshooting_explains_are_said():
    """Each phrase of its first column stands in the sources, but for pip's own."""
    rows = re.findall(r"^\| `(.*?)` \|", TROUBLES.read_text(), re.MULTILINE)
    rows += [part for row in re.findall(r"^\| (`.*?) \|", TROUBLES.read_text(), re.MULTILINE)
             for part in re.findall(r"`(.*?)`", row)]  # fmt: skip
    phrases = {part.strip(" :") for row in rows for part in row.split("...") if "`" not in part}
    phrases -= {"", "externally-managed-environment"}
    folders = ("mlx_vlm_edge", "convert/mlx_vlm_edge_convert")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    # A message may be broken over lines of source.
    sources = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files)
    assert len(phrases) > 10
    assert [phrase for phrase in phrases if phrase not in sources] == []


def test_the_site_s_reference_has_every_verb_and_flag(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    import hooks

    text = hooks.command_line()
    for verb in VERBS:
        parser = Parser(prog=verb)
        import_module(f"mlx_vlm_edge.cli.{verb}").add_arguments(parser)
        assert f"## {verb}" in text
        for action in parser._actions:
            if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
                assert all(f"`{flag}`" in text for flag in action.option_strings)


def test_every_page_that_the_site_takes_from_elsewhere_is_there(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    import hooks

    assert [name for name in hooks.DOCUMENTS.values() if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    "arguments", [["ask.py", "photo.jpg", "What is it?"], ["compare.py", "before.jpg", "after.jpg"]]
)
def test_an_example_runs(native_folder, pictures, arguments):
    script, *rest = arguments
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *rest, str(native_folder)],
        capture_output=True,
        cwd=pictures,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_an_example_without_its_model_says_so_in_one_line(pictures, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(pictures / "hub"))
    for script, *rest in (
        ("ask.py", "photo.jpg", "?", "some/model"),
        ("compare.py", *PICTURES[:2]),
    ):
        command = [sys.executable, str(ROOT / "examples" / script), *rest]
        done = subprocess.run(command, capture_output=True, cwd=pictures, check=False)
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1, done.stderr
        assert b"not on this machine" in done.stderr


ODD = (384, 384), (2000, 200), (1021, 1243)  # pictures that some family cuts up most, or least


def model_rows() -> dict[tuple[str, ...], str]:
    """README's table of models: the aliases of each row -> its visual tokens per image."""
    rows = re.findall(
        r"^\| (`.*?) \|.*\| (.*?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    known, found = {*configs.names(), DEMO}, {}
    for cell, counts in rows:
        names: list[str] = []
        for name in re.findall(r"`([^`]+)`", cell):
            if name.startswith("-"):  # in place of the end of the last name
                parts = names[-1].split("-")
                stems = ["-".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
                name = next(stem + name for stem in stems if stem + name in known)
            names.append(name)
        if names[0] in known:
            found[tuple(names)] = counts
    return found


def test_the_table_of_models_has_all_of_them():
    named = [alias for row in model_rows() for alias in row]
    assert sorted(named) == sorted([*configs.names(), DEMO])


@pytest.mark.parametrize(("aliases", "told"), model_rows().items(), ids=lambda part: part[0])
def test_a_model_has_as_many_visual_tokens_as_its_row_says(aliases, told):
    """One count, one for each alias, or a range: no ordinary picture's is beyond its ends, and each
    end is some picture's."""
    told = re.split(r" at |, [(`]", told)[0]
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\b", told)]
    plans = [cost.blueprint(cost.config_of(alias)) for alias in aliases]
    ordinary, odd = (
        [[plan.processor.visual_tokens(plan.pixels(size)) for size in sizes] for plan in plans]
        for sizes in (ORDINARY, ODD)
    )
    if " to " not in told:
        told_of = numbers if len(numbers) > 1 else numbers * len(aliases)
        assert [{*some, *more} for some, more in zip(ordinary, odd, strict=True)] == [
            {number} for number in told_of
        ]
        return
    assert {*numbers} <= {*chain(*ordinary, *odd)}
    assert max(chain(*ordinary)) <= numbers[-1]
    assert told.startswith("up") or min(chain(*ordinary)) >= numbers[0]
