"""The demo model's question sets -> the share that it answers rightly.

Pictures and questions are those of examples/demo_model/evaluate.py, which is there in a checkout
and needs the fonts of the extra "demo".
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[3] / "examples" / "demo_model"
FONTS = "font_roboto"
SCENES, SIDE, NAME = 8, 256, "curve"
TOKENS = 40
Answer = Callable[[Any, str], str]


def available() -> bool:
    return (FOLDER / "evaluate.py").is_file() and find_spec(FONTS) is not None


def accuracy(answer: Answer, scenes: int = SCENES) -> dict[str, float]:
    """Share of right answers by kind of question, "all" among them, about so many scenes each."""
    with _importable(), redirect_stdout(StringIO()):
        table = import_module("evaluate").measure(answer, scenes, SIDE, NAME)
    shares = {kind: float(row["share"]) for kind, row in table.items()}
    return shares | {"all": sum(shares.values()) / len(shares)}


@contextmanager
def _importable() -> Iterator[None]:
    """Those files import each other by their names alone."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
