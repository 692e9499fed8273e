"""The vision part (a picture -> visual tokens, or image features) and the connector by itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from mlx_vlm_edge.errors import UsageError

from ..check import audit
from ..check.interpreter import Package
from ..check.rounded import check_rounded
from ..emit import connectors
from ..emit.network import Network, Value
from ..emit.toolkit import tools
from ..names import FEATURES, IMAGE, MAIN, TOKENS
from ..package.save import save_arrays, save_package
from ..parity import Check, Parity, distance
from ..part import Function, Options, UnexportableError
from .encoders import Encoder

ARRAYS = "_arrays.safetensors"
# Relative errors that a sound package stays below: in float32, and rounded to float16.
GRAPH, HALF = 1e-5, 2e-2
LAST, OTHERS = slice(-1, None), slice(-1)  # of the pictures


class Case:
    """A picture to compare on, uint8 [H, W, 3], and what MLX makes of it."""

    def __init__(self, name: str, pixels: np.ndarray, encoder: Encoder) -> None:
        self.name, self.pixels, self._encoder = name, pixels, encoder

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        """Image features [1, N, C] and visual tokens [1, M, D], float32."""
        outputs = self._encoder.reference(self.pixels)
        return {name: np.array(array, np.float32) for name, array in outputs.items()}


class Segment(Protocol):
    """What of an encoder one package computes: the tower, or the connector; one input."""

    @property
    def name(self) -> str:
        """Of the part."""
        ...

    def images(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs that are pictures."""
        ...

    def emit(self, net: Network) -> Any:
        """The MIL program, its operations noted in `net`."""
        ...

    def inputs(self, case: Case, half: bool) -> dict[str, np.ndarray]:
        """What the program is run on."""
        ...


@dataclass(frozen=True)
class Tower:
    """image -> visual_tokens, or image_features without the connector."""

    encoder: Encoder
    options: Options
    name: str = "vision"

    def images(self) -> dict[str, tuple[int, ...]]:
        """The picture, unless a tensor was asked for."""
        return {IMAGE: (1, 3, *self.encoder.pixels.size)} if self._takes_image else {}

    @property
    def _takes_image(self) -> bool:
        return self.options.image_input

    def emit(self, net: Network) -> Any:
        """A picture is float32 inside Core ML until the program rounds it."""
        mb, connector = tools().mb, self.encoder.connector
        rounds = net.half and self._takes_image

        def program(image: Any) -> Any:
            x = Value(mb.cast(x=image, dtype="fp16", name="image_half") if rounds else image)
            x = self.encoder.emit(net, x)
            if connector is None or not self.options.fused:
                return net.tokens(x, TOKENS if connector is None else FEATURES).var
            return net.tokens(connectors.emit(net, connector, x), TOKENS).var

        shape = (1, 3, *self.encoder.pixels.size)
        return _program(program, shape, net.half and not rounds)

    def inputs(self, case: Case, half: bool) -> dict[str, np.ndarray]:
        """Pixels of 0..255, channels first."""
        return {IMAGE: case.pixels.transpose(2, 0, 1)[None].astype(np.float32)}


@dataclass(frozen=True)
class Connector:
    """image_features -> visual_tokens."""

    encoder: Encoder
    name: str = "connector"

    def __post_init__(self) -> None:
        if self.encoder.connector is None:
            raise UsageError("this model has no connector: its vision part gives visual tokens")

    def images(self) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def emit(self, net: Network) -> Any:
        """Features in reading order, as the tower's package gives them."""
        C, (h, w), connector = self.encoder.width, self.encoder.grid, self.encoder.connector

        def program(image_features: Any) -> Any:
            turned = tools().mb.transpose(x=image_features, perm=[0, 2, 1], name="channels_first")
            x = net.reshape(Value(turned), (1, C, h, w), "features")
            return net.tokens(connectors.emit(net, connector, x), TOKENS).var

        return _program(program, (1, h * w, C), net.half)

    def inputs(self, case: Case, half: bool) -> dict[str, np.ndarray]:
        """MLX's own features."""
        return {FEATURES: case.reference[FEATURES].astype(np.float16 if half else np.float32)}


MINIMUM, SEVERAL = "iOS16", "iOS18"


def _program(function: Callable[[Any], Any], shape: tuple[int, ...], half: bool) -> Any:
    """A program of one input, named as the function's argument."""
    mb, types = tools().mb, tools().types
    spec = mb.TensorSpec(shape=shape, dtype=types.fp16 if half else types.fp32)
    target = getattr(tools().ct.target, MINIMUM)
    return mb.program(input_specs=[spec], opset_version=target)(function)


@dataclass(frozen=True)
class View:
    """A further size of pictures: what its function computes, and what that is compared on."""

    segment: Segment
    cases: Sequence[Case]


@dataclass(frozen=True)
class VisionPart:
    """A part with a function of fixed shapes for each size of pictures, whose ranges the audit can
    repair, for all of them alike, so that they share their weights.

    notes, arrays: for the host, in the manifest and beside the package. powers: by site, the power
    of two that values are held smaller by. islands: operations in float32. others: by function, the
    sizes beside that of `main`. sites: of the operations that were emitted last.
    """

    segment: Segment
    options: Options
    cases: Sequence[Case]
    notes: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    powers: Mapping[str, int] = field(default_factory=dict)
    islands: frozenset[str] = frozenset()
    others: Mapping[str, View] = field(default_factory=dict)
    sites: dict[str, tuple[str, int]] = field(default_factory=dict, compare=False)

    @property
    def minimum(self) -> str:
        """Packages of several functions came with iOS 18."""
        return SEVERAL if self.others else MINIMUM

    @property
    def _views(self) -> dict[str, View]:
        """By function."""
        return {MAIN: View(self.segment, self.cases), **self.others}

    @property
    def name(self) -> str:
        """Of the part and its package."""
        return self.segment.name

    @property
    def _half(self) -> bool:
        return self.options.precision != "fp32" and not self.islands

    def _network(self) -> Network:
        by_head = self.options.compute == "cpu-ne"
        return Network(self._half, self.powers, split_heads=by_head, sites=self.sites)

    def functions(self) -> Sequence[Function]:
        """`main`, and one for each further size."""
        return [
            Function(name, partial(self._emitted, segment), segment.images(), self.islands or None)
            for name, segment in ((name, view.segment) for name, view in self._views.items())
        ]

    def _emitted(self, segment: Segment) -> Any:
        return segment.emit(self._network())

    def write_files(self, folder: Path) -> None:
        """What of the family's vision weights the host computes with, where there is any."""
        if self.arrays:
            save_arrays(self.arrays, folder / f"{self.name}{ARRAYS}")

    def memory(self) -> dict[str, int]:
        """Nothing that lasts."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What was done about ranges, and what the family's host must do."""
        repairs = {"powers_of_two": dict(self.powers), "float32": sorted(self.islands)}
        files = {"arrays": f"{self.name}{ARRAYS}"} if self.arrays else {}
        return {**self.notes, **files, "range_repair": repairs}

    def warnings(self) -> list[str]:
        """How what leaves float16 is held."""
        powers = ", ".join(f"{site} by 2^{k}" for site, k in self.powers.items())
        smaller = [f"held smaller, {powers}"] if powers else []
        islands = [f"{len(self.islands)} operations in float32"] if self.islands else []
        repairs = "; ".join([*smaller, *islands])
        return [f"activations leave float16: {repairs}"] if repairs else []

    def verified(self, path: Path) -> "tuple[VisionPart, Check]":
        """Save the package and compare it on every picture, its ranges repaired where they need it.

        A float16 package has a float32 twin for this: the twin must be what MLX computes, the
        package the twin rounded, and then near MLX itself on the first picture. The ranges are the
        twin's.
        Raises UsageError when the package is damaged or not its twin, or for what only float32 can
        hold, unless the precision is mixed.
        """
        if self.options.precision == "fp32":
            save_package(self, path)
            check = self._run(path, GRAPH, "")
            return self, replace(check, trial=self._trial())
        with TemporaryDirectory(dir=path.parent) as folder:
            twin = Path(folder) / path.name
            part, whole = self._in_range(twin)
            save_package(part, path)
            check_rounded(path, twin)
        narrow = part._run(path, HALF, "", slice(1))
        parity = (*whole.parity, *narrow.parity)
        return part, replace(whole, parity=parity, trial=self._trial())

    def _in_range(self, path: Path) -> "tuple[VisionPart, Check]":
        """The part whose float32 twin stays in float16's range on every picture, and how the twin,
        saved at `path`, compares.

        The last picture comes first: it is the one that drives activations furthest, and what it
        has repaired need not be run on the others.
        """
        part, twin = self, self._saved_twin(path)
        check = twin._graph(path, LAST)
        while True:
            if not (repaired := part.repaired(check, twin.sites)):
                check = twin._graph(path, OTHERS).joined(check)
                repaired = part.repaired(check, twin.sites)
            if not repaired:
                return part, check
            part, twin = repaired, repaired._saved_twin(path)
            check = twin._graph(path, LAST)

    def _trial(self) -> dict[str, np.ndarray]:
        """The first picture, uint8 [H, W, 3], and what MLX makes of it, in float16."""
        case = self.cases[0]
        outputs = {name: array.astype(np.float16) for name, array in case.reference.items()}
        return {IMAGE: case.pixels, **outputs}

    def _saved_twin(self, path: Path) -> "VisionPart":
        """The same in float32."""
        options = replace(self.options, precision="fp32")
        twin = replace(self, options=options, islands=frozenset(), sites={})
        save_package(twin, path)
        return twin

    def _graph(self, path: Path, cases: slice) -> Check:
        return self._run(path, GRAPH, " (graph)", cases)

    def _run(self, path: Path, limit: float, note: str, cases: slice = slice(None)) -> Check:
        """Every function on its pictures, or some of them."""
        package, parity = Package(path, track=True), []
        for function, view in self._views.items():
            size = "" if function == MAIN else f", {function}"
            for case in view.cases[cases]:
                outputs = package.run(function, view.segment.inputs(case, self._half))
                for name, output in outputs.items():
                    error = distance(output, case.reference[name])
                    parity.append(Parity(self.name, case.name + size + note, error, limit))
        return Check(tuple(parity), dict(package.ranges), summed=dict(package.summed))

    def repaired(self, check: Check, sites: audit.Sites) -> "VisionPart | None":
        """The same with its ranges brought into float16; None where nothing leaves it.

        sites: of the twin that was checked.

        Raises UnexportableError for what only float32 can hold, unless the precision is mixed.
        """
        if self.islands >= {*audit.leaving(audit.sums(check.ranges, check.summed))}:
            return None
        repair = audit.repair(check.ranges, sites, self.powers, check.summed)
        if repair.beyond and self.options.precision != "mixed":
            worst = max(repair.beyond, key=lambda name: check.ranges[name])
            raise UnexportableError(
                f"{self.name}: {len(repair.beyond)} operations leave float16 ({worst} reaches "
                f"{check.ranges[worst]:.3g})",
                "use --precision mixed or fp32", wider=True,
            )  # fmt: skip
        if repair.powers == self.powers and repair.beyond <= self.islands:
            return None  # sums at no site, which no power holds smaller
        return replace(self, powers=repair.powers, islands=self.islands | repair.beyond)
