#!/usr/bin/env python3
"""Print simple style figures for the Python files under one or more folders.

    python code_figures.py mlx_vlm_edge [convert ...]     one column per folder
    python code_figures.py --exclude tests mlx_lm         leave out path parts
    python code_figures.py --longest 10 mlx_lm            also list long functions
    python code_figures.py --max-function 80 mlx_lm       exit 1 when exceeded
    python code_figures.py --limits mlx_vlm_edge          exit 1 over this project's limits

Standard library only. A function's length is its `def` line to its last line,
decorators left out. A comment line is a line that holds only a comment.
Complexity is 1 + branch points (McCabe, roughly). A repeated function is one
of 6+ lines whose body, docstring dropped, occurs again word for word.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

BRANCHES = (
    ast.If,
    ast.For,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.With,
    ast.comprehension,
    ast.Assert,
    ast.match_case,
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Function:
    where: str
    name: str
    length: int
    args: int
    complexity: int
    documented: bool
    annotated: bool
    body: str | None  # None when too short to count as a repeat


@dataclass
class Figures:
    files: dict[str, int] = field(default_factory=dict)
    code: int = 0
    comment: int = 0
    docstring: int = 0
    blank: int = 0
    classes: int = 0
    functions: list[Function] = field(default_factory=list)
    unparsed: list[str] = field(default_factory=list)


def complexity(node: ast.AST) -> int:
    total = 1
    for child in ast.walk(node):
        if isinstance(child, ast.BoolOp):
            total += len(child.values) - 1
        elif isinstance(child, BRANCHES):
            total += 1
    return total


def span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def docstring_lines(node: Documented) -> int:
    """Lines taken by the docstring of a module, class or function."""
    return span(node.body[0]) if ast.get_docstring(node, clean=False) is not None else 0


def read_function(node: ast.FunctionDef | ast.AsyncFunctionDef, where: str) -> Function:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments = [a for a in arguments if a.arg not in ("self", "cls")]
    length = span(node)
    documented = docstring_lines(node) > 0
    text = "\n".join(ast.unparse(s) for s in (node.body[1:] if documented else node.body))
    return Function(
        where=f"{where}:{node.lineno}",
        name=node.name,
        length=length,
        args=len(arguments),
        complexity=complexity(node),
        documented=documented,
        annotated=all(a.annotation for a in arguments),
        body=text if length >= 6 and text != "..." else None,  # an overload has none
    )


def comment_only_lines(text: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")
    }


def measure(root: Path, exclude: set[str]) -> Figures:
    figures = Figures()
    paths = [root] if root.is_file() else sorted(root.rglob("*.py"))
    for path in paths:
        if exclude & set(path.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree, comments = ast.parse(text), comment_only_lines(text)
        except (SyntaxError, tokenize.TokenError):
            figures.unparsed.append(str(path))
            continue
        lines = text.splitlines()
        blank = sum(not line.strip() for line in lines)
        docs = 0
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                figures.functions.append(read_function(node, str(path)))
            elif isinstance(node, ast.ClassDef):
                figures.classes += 1
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
                docs += docstring_lines(node)
        figures.files[str(path)] = len(lines)
        figures.blank += blank
        figures.comment += len(comments)
        figures.docstring += docs
        figures.code += len(lines) - blank - len(comments) - docs
    return figures


def quantile(values: list[int], q: float) -> int:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def rows(f: Figures) -> dict[str, object]:
    file_lines = list(f.files.values())
    lengths = [x.length for x in f.functions]
    public = [x for x in f.functions if not x.name.startswith("_")]
    bodies = Counter(x.body for x in f.functions if x.body)
    repeated = sum(n for n in bodies.values() if n > 1)
    written = f.code + f.comment + f.docstring
    return {
        "files": len(file_lines),
        "lines": sum(file_lines),
        "code lines": f.code,
        "file lines, median": quantile(file_lines, 0.5),
        "file lines, p90": quantile(file_lines, 0.9),
        "file lines, max": max(file_lines, default=0),
        "files over 500 lines": sum(n > 500 for n in file_lines),
        "classes": f.classes,
        "functions": len(lengths),
        "function lines, median": quantile(lengths, 0.5),
        "function lines, p90": quantile(lengths, 0.9),
        "function lines, p99": quantile(lengths, 0.99),
        "function lines, max": max(lengths, default=0),
        "functions over 50 lines": share(sum(n > 50 for n in lengths), len(lengths)),
        "functions over 100 lines": sum(n > 100 for n in lengths),
        "arguments, p90": quantile([x.args for x in f.functions], 0.9),
        "arguments, max": max((x.args for x in f.functions), default=0),
        "complexity, p90": quantile([x.complexity for x in f.functions], 0.9),
        "complexity, max": max((x.complexity for x in f.functions), default=0),
        "comment lines": share(f.comment, written),
        "docstring lines": share(f.docstring, written),
        "public functions documented": share(sum(x.documented for x in public), len(public)),
        "functions fully annotated": share(sum(x.annotated for x in f.functions), len(f.functions)),
        "functions of 6+ lines repeated": share(repeated, bodies.total()),
        "unparsed files": len(f.unparsed),
    }


LIMITS = {"file lines": 400, "function lines": 80, "arguments": 9, "complexity": 15}
EXEMPT = "add_arguments"  # an argument-parser function may take what it needs


def breaches(columns: list[Figures]) -> list[str]:
    """One line for each place that is over a limit of this project."""
    functions = [x for f in columns for x in f.functions]
    found = [f"{path}: does not parse" for f in columns for path in f.unparsed]
    for path, lines in (item for f in columns for item in f.files.items()):
        if lines > LIMITS["file lines"]:
            found.append(f"{path}: {lines} lines, at most {LIMITS['file lines']}")
    bodies = Counter(x.body for x in functions if x.body)
    for x in functions:
        figures = {"function lines": x.length, "arguments": x.args, "complexity": x.complexity}
        for figure, value in figures.items():
            if value > LIMITS[figure] and (x.name != EXEMPT or figure != "arguments"):
                found.append(f"{x.where}: {x.name}, {figure} {value}, at most {LIMITS[figure]}")
        if not x.annotated:
            found.append(f"{x.where}: {x.name}, an argument without a type")
        if x.body and bodies[x.body] > 1:
            found.append(f"{x.where}: {x.name}, its body occurs {bodies[x.body]} times")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--exclude", action="append", default=[], metavar="PART")
    parser.add_argument("--longest", type=int, default=0, metavar="N")
    parser.add_argument("--max-function", type=int, metavar="LINES")
    parser.add_argument("--limits", action="store_true", help="fail over this project's limits")
    options = parser.parse_args()

    figures = [measure(p, set(options.exclude)) for p in options.folders]
    columns = [rows(f) for f in figures]
    heads = ["figure", *(p.name[:16] for p in options.folders)]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for key in columns[0]:
        print(f"| {key} | " + " | ".join(str(c[key]) for c in columns) + " |")

    everything = sorted((x for f in figures for x in f.functions), key=lambda x: -x.length)
    for x in everything[: options.longest]:
        print(
            f"{x.length:5} lines  complexity {x.complexity:3}  {x.args:2} args  {x.name}  {x.where}"
        )
    if options.limits:
        found = breaches(figures)
        print("\n".join(found) or f"Within the limits: {LIMITS}")
        return int(bool(found))
    limit = options.max_function
    return int(bool(limit and everything and everything[0].length > limit))


if __name__ == "__main__":
    sys.exit(main())
