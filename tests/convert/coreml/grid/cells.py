"""The grid: every model by source dtype, bits, precision and compute units; pairs of them for CI.

A cell is exported in its parts, each verified by the exporter, or refused with one line. The second
reader must agree on every package.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx_vlm_edge_convert.coreml import manifest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.export import export
from mlx_vlm_edge_convert.coreml.parity import distance
from mlx_vlm_edge_convert.coreml.part import Options

from mlx_vlm_edge.errors import UsageError

from .models import MODELS, SOURCES, Folders
from .reader import Reader

BITS = (None, 4, 8, "palette4")
CONTEXT = 64
AGREE = 1e-5  # between the two interpreters, of which one computes in float64
HIDDEN = -1e4


@dataclass(frozen=True)
class Cell:
    """One combination of options."""

    model: str
    source: str
    bits: Any
    precision: Any
    compute: Any

    @property
    def options(self) -> Options:
        return Options(
            precision=self.precision, compute=self.compute, bits=self.bits, context=CONTEXT
        )

    @property
    def refused(self) -> bool:
        """Whether it is refused: weights in groups on the Neural Engine."""
        return self.compute == "cpu-ne" and self.bits in (4, 8)

    def __str__(self) -> str:
        return "-".join("none" if value is None else str(value) for value in astuple(self))


FACTORS = (tuple(MODELS), tuple(SOURCES), BITS, ("fp16", "fp32", "mixed"), ("cpu-gpu", "cpu-ne"))
CELLS = [Cell(*values) for values in itertools.product(*FACTORS)]


def _pairs(cell: Cell) -> set[Any]:
    return {*itertools.combinations(enumerate(astuple(cell)), 2)}


def pairwise() -> list[Cell]:
    """Cells in which every two options of different factors stand together at least once."""
    missing: set[Any] = set().union(*map(_pairs, CELLS))
    chosen: list[Cell] = []
    while missing:
        best = max(CELLS, key=lambda cell: len(_pairs(cell) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


@dataclass(frozen=True)
class Outcome:
    """error: the largest that the exporter measured, relative. second: how far the two interpreters
    are apart, at the most. refusal: the line instead of them."""

    cell: Cell
    error: float = 0.0
    second: float = 0.0
    refusal: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


class Grid:
    """Runs cells; what does not depend on the bits is exported once."""

    def __init__(self, root: Path) -> None:
        self.folders, self.out = Folders(root / "models"), root / "out"
        root.joinpath("models").mkdir(parents=True)
        self._encoders: dict[Cell, Outcome] = {}

    def run(self, cell: Cell) -> Outcome:
        """Raises UsageError, or AssertionError for interpreters that differ, for what is wrong."""
        folder = self.folders(cell.model, cell.source)
        if cell.refused:
            try:
                export(folder, self.out, options=cell.options)
            except UsageError as refusal:
                return Outcome(cell, refusal=str(refusal))
            raise AssertionError(f"{cell} was not refused")
        own = replace(cell, bits=None)
        if own not in self._encoders:
            self._encoders[own] = self._exported(own, ("vision",))
        encoder, decoder = self._encoders[own], self._exported(cell, ("decoder",))
        return Outcome(cell, max(encoder.error, decoder.error), max(encoder.second, decoder.second))

    def _exported(self, cell: Cell, parts: tuple[str, ...]) -> Outcome:
        folder = self.folders(cell.model, cell.source)
        bundle = export(folder, self.out, parts=parts, options=cell.options, overwrite=True)
        listed = manifest.read(bundle)["parts"].values()
        errors = [entry["error"] for part in listed for entry in part["parity"]]
        second = [apart(bundle / part["package"], part["functions"]) for part in listed]
        assert max(second) < AGREE, f"{cell}: the interpreters are {max(second):.1e} apart"
        return Outcome(cell, max(errors), max(second))


def apart(package: Path, functions: dict[str, Any]) -> float:
    """How far the second reader is from the first on a package's functions, one after the other."""
    first, second = Package(package, "fp32"), Reader(package)
    state, errors = None, []
    for place, (name, ports) in enumerate(functions.items()):
        inputs = dict(_inputs(ports["inputs"], place))
        if state is None and ports["states"]:
            state = first.new_state(name)
        expected, outputs = second.run(name, inputs), first.run(name, inputs, state)
        errors += [distance(outputs[key], array) for key, array in expected.items()]
    return max(errors)


def _inputs(ports: list[dict[str, Any]], place: int) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures of 0..255, masks that hide half, one picked position, the cache written from its
    start or further on, small numbers else."""
    random = np.random.default_rng(place)
    several = any(port["name"] == "pick" for port in ports)
    for port in ports:
        name, shape = port["name"], tuple(port["shape"])
        if name == "image":
            yield name, random.integers(0, 256, shape).astype(np.float32)
        elif name == "mask":
            yield name, np.where(random.random(shape) < 0.5, HIDDEN, 0).astype(np.float32)
        elif name == "position":
            yield name, np.full(shape, 0 if several else 5, np.int32)
        elif name == "pick":
            yield name, np.eye(int(np.prod(shape)), dtype=np.float32)[place].reshape(shape)
        else:
            yield name, random.standard_normal(shape).astype(np.float32)
