"""What the site has beside docs/: documents that live elsewhere, and the command line's reference.

Links are written for readers of the repository. One to a file that the site has leads to its page;
one to any other file becomes the file's name.
"""

import argparse
import posixpath
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mlx_vlm_edge.cli import PROGRAM, VERBS, Parser

ROOT = Path(__file__).parents[2]
DOCS = "docs"
# Page -> the repository's file that it is.
DOCUMENTS = {
    "models.md": "mlx_vlm_edge/models/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "claims.md": "benchmarks/mlx_vlm_edge_bench/claims/data/README.md",
    "demo.md": "examples/demo_model/README.md",
    "examples.md": "examples/README.md",
    "swift.md": "examples/swift/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PAGES = {source: page for page, source in DOCUMENTS.items()} | {"README.md": "index.md"}
PICTURES = (".png", ".jpg", ".svg", ".webp", ".gif")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/, and those that stand elsewhere or nowhere."""
    for page, source in DOCUMENTS.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for picture in _pictures(source, text):
            files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def _pictures(source: str, text: str) -> Iterator[str]:
    """The pictures that a document shows, by their names in the repository."""
    for target in {match[3] for match in LINK.finditer(text)}:
        name = _resolved(source, target)
        if name.endswith(PICTURES) and not name.startswith(f"{DOCS}/"):
            yield name


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with its links leading to pages."""
    source = DOCUMENTS.get(page.file.src_uri, f"{DOCS}/{page.file.src_uri}")
    return LINK.sub(lambda match: _relinked(match, source, page.file.src_uri), markdown)


def _relinked(match: re.Match[str], source: str, page: str) -> str:
    mark, label, target = match.groups()
    if "://" in target or target.startswith(("#", "mailto:")):
        return match[0]
    name, _, anchor = target.partition("#")
    place = _resolved(source, name)
    if place.startswith(f"{DOCS}/"):
        inside = place.removeprefix(f"{DOCS}/")
    elif place.endswith(PICTURES):
        inside = place
    elif place in PAGES or f"{place}/README.md" in PAGES:
        inside = PAGES.get(place) or PAGES[f"{place}/README.md"]
    else:
        return label if label.strip("`") == place else f"{label} (`{place}`)"
    link = posixpath.relpath(inside, posixpath.dirname(page) or ".")
    return f"{mark}[{label}]({link}{'#' + anchor if anchor else ''})"


def _resolved(source: str, target: str) -> str:
    """A link's file by its name from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))


def command_line() -> str:
    """The reference of all verbs, from their own parsers."""
    parts = [
        "# Command line",
        f"`{PROGRAM} VERB [options]`. A mistake is one line and exit code 2. Answers go to "
        "standard output, everything else to standard error.",
        "| verb | what it does |\n|---|---|",
        *(f"| [`{verb}`](#{verb}) | {text} |" for verb, text in VERBS.items()),
    ]
    table = "\n".join(parts[2:])
    verbs = [_verb(verb) for verb in VERBS]
    return "\n\n".join([parts[0], parts[1], table, *verbs]) + "\n"


def _verb(verb: str) -> str:
    module = import_module(f"mlx_vlm_edge.cli.{verb}")
    parser = Parser(prog=f"{PROGRAM} {verb}")
    module.add_arguments(parser)
    return "\n\n".join([f"## {verb}", module.HELP, *_described(parser)])


def _described(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A parser's groups as tables; of a verb with verbs of its own, theirs."""
    for group in parser._action_groups:
        rows = [row for action in group._group_actions if (row := _row(action))]
        if rows:
            title = (group.title or "").capitalize()
            yield "\n".join([f"**{title}**\n", "| | |", "|---|---|", *rows])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, inner in action.choices.items():
                if name not in helps:  # another name of one that is
                    continue
                yield f"### {parser.prog.removeprefix(f'{PROGRAM} ')} {name}"
                yield f"{helps.get(name) or ''}".capitalize()
                yield from _described(inner)


def _row(action: argparse.Action) -> str:
    """A flag's line, "" for what is not shown."""
    hidden = action.help == argparse.SUPPRESS or isinstance(
        action, argparse._HelpAction | argparse._SubParsersAction
    )
    if hidden:
        return ""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{_value(action)}`"
    value = f" `{_value(action)}`" if action.option_strings and action.nargs != 0 else ""
    told = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    shown = action.default not in (None, False, [], argparse.SUPPRESS) and action.nargs != 0
    if shown and "default" not in told:
        told += f" (default: {action.default})"
    return f"| {names}{value} | {_cell(told)} |"


def _value(action: argparse.Action) -> str:
    if action.metavar:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices:
        return "|".join(map(str, action.choices))
    return action.dest.upper() if action.option_strings else action.dest


def _cell(text: str) -> Any:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
