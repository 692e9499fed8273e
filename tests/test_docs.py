"""What the documents tell a reader to type: it parses, it runs, and its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from mlx_vlm_edge.cli import Parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/**/README.md")]
PICTURES = ("photo.jpg", "before.jpg", "after.jpg")


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a document in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands() -> list[str]:
    lines = [line for path in DOCUMENTS for block in blocks(path, "bash", "", "sh")
             for line in block.splitlines()]  # fmt: skip
    return sorted({line for line in lines if line.startswith("mlx-vlm-edge ")})


@pytest.fixture
def pictures(tmp_path):
    for index, name in enumerate(PICTURES):
        Image.new("RGB", (192, 160), (80 * index, 120, 40)).save(tmp_path / name)
    return tmp_path


def test_there_are_commands_to_check():
    assert len(commands()) > 2


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command):
    _, verb, *arguments = shlex.split(command, comments=True)
    parser = Parser(prog=verb)
    import_module(f"mlx_vlm_edge.cli.{verb}").add_arguments(parser)
    parser.parse_args(arguments)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {name for path in DOCUMENTS for name in re.findall(r"`make (\w+)", path.read_text())}
    assert asked
    assert asked <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#]+)", path.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_the_python_of_the_readme_runs(native_folder, pictures, monkeypatch, capsys):
    """With the tiny model and small pictures in the place of the real ones."""
    monkeypatch.chdir(pictures)
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    assert '"fastvlm-0.5b"' in code
    exec(code.replace('"fastvlm-0.5b"', repr(str(native_folder))), {})
    assert capsys.readouterr().out


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
