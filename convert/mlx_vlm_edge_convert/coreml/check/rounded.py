"""Whether a float16 package is its float32 twin, rounded: the same graph, each constant cast.

The twin is held against MLX at float32's precision, where float16 would hide a small fault; this
carries the verdict over to the package that stays.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_edge.errors import UsageError

from ..package.interface import blocks
from ..package.saved import Saved

ROUNDED = "_cast_fp16"  # what coremltools adds to the names of what it rounds


class _Graph:
    """The operations of a function by what they make, casts left out."""

    def __init__(self, saved: Saved, block: Any) -> None:
        self.saved = saved
        self.operations: dict[str, Any] = {}
        self._constants: dict[str, Any] = {}
        self._sources: dict[str, str] = {}
        for op in block.operations:
            name = op.outputs[0].name
            if op.type == "const":
                self._constants[name] = op.attributes["val"]
            elif op.type == "cast":
                self._sources[name] = self.source(op.inputs["x"].arguments[0].name)
            else:
                self.operations[plain(name)] = op
        self.outputs = [self.source(name) for name in block.outputs]

    def source(self, name: str) -> str:
        """The operation that made a value, whatever it was cast to since."""
        return self._sources.get(name, plain(name))

    def reads(self, op: Any) -> Iterator[tuple[str, Any]]:
        """Each input's name with a constant's value, or with the name of what made it."""
        for argument, bound in sorted(op.inputs.items()):
            for number, item in enumerate(bound.arguments):
                key = f"{argument} {number}"
                if item.WhichOneof("binding") == "value":
                    yield key, self.saved.value(item.value)
                elif item.name in self._constants:
                    yield key, self.saved.value(self._constants[item.name])
                else:
                    yield key, _Name(self.source(item.name))


class _Name(str):
    """The name of a value, which is not a string constant."""


def plain(name: str) -> str:
    """An operation's name before coremltools rounded it."""
    return name.replace(ROUNDED, "")


def check_rounded(package: Path, twin: Path) -> None:
    """Raises UsageError, naming an operation, unless `package` is `twin` rounded."""
    narrow, whole = _graphs(package), _graphs(twin)
    if narrow.keys() != whole.keys():
        _refuse(package, "a function")
    for name, graph in narrow.items():
        _check_graph(package, graph, whole[name])


def _graphs(path: Path) -> dict[str, _Graph]:
    """By function."""
    saved = Saved(path)
    return {name: _Graph(saved, block) for name, _, block in blocks(saved)}


def _check_graph(package: Path, narrow: _Graph, whole: _Graph) -> None:
    odd = sorted(narrow.operations.keys() ^ whole.operations.keys())
    if odd or narrow.outputs != whole.outputs:
        _refuse(package, odd[0] if odd else "an output")
    for name, op in narrow.operations.items():
        other = whole.operations[name]
        names = [[plain(out.name) for out in item.outputs] for item in (op, other)]
        if op.type != other.type or names[0] != names[1]:
            _refuse(package, name)
        ours, theirs = dict(narrow.reads(op)), dict(whole.reads(other))
        if ours.keys() != theirs.keys() or not _equal(ours, theirs):
            _refuse(package, name)


def _equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return all(_same(value, theirs[key]) for key, value in ours.items())


def _same(narrow: Any, whole: Any) -> bool:
    if isinstance(narrow, np.ndarray) and isinstance(whole, np.ndarray):
        with np.errstate(over="ignore"):
            return np.array_equal(narrow, whole.astype(narrow.dtype))
    return type(narrow) is type(whole) and bool(narrow == whole)


def _refuse(package: Path, name: str) -> None:
    raise UsageError(
        f"the exported {package.name} is wrong: {name} is not as it was emitted; nothing was kept"
    )
