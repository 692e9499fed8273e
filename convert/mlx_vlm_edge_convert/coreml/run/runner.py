"""What executes a saved package: Core ML on a Mac, through coremltools, our interpreter elsewhere.

Both take the same calls. For Core ML a package is compiled first, once for a folder, and loaded
once for each of its functions that is called.
"""

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import first_line

from ..check.interpreter import Package
from ..emit.toolkit import require_library, tools
from ..names import COMPILED_SUFFIX
from ..package.interface import interface
from ..part import Say

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-gpu": "CPU_AND_GPU", "cpu-ne": "CPU_AND_NE"}


class Runner(Protocol):
    """Runs a package's functions. `state` is what `new_state` gave; None where there is none."""

    def new_state(self, function: str) -> Any:
        """A state of zeros; functions with the same states can share it."""
        ...

    def run(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> Mapping[str, np.ndarray]:
        """Outputs by name; a picture is an array [1, 3, H, W] of 0..255."""
        ...

    def read(self, state: Any, name: str) -> np.ndarray:
        """What a state holds under a name."""
        ...

    def write(self, state: Any, name: str, values: np.ndarray) -> None:
        """Put values at the start of a state, along each of its axes."""
        ...


def runner(package: Path, units: str, folder: Path, say: Say) -> Runner:
    """What runs a package on this machine. units: of UNITS, for Core ML.

    folder: where what Core ML compiles is kept. Raises UsageError where Core ML refuses.
    """
    if sys.platform != "darwin":
        return Package(package)
    return CoreMLPackage(package, compiled(package, folder, say), units)


def require_mac() -> None:
    """Raises UsageError where there is no Core ML, or nothing that reaches it."""
    if sys.platform != "darwin":
        raise UsageError("Core ML runs packages on a Mac only, and this is none")
    tools()
    require_library("libcoremlpython")


def compiled(package: Path, folder: Path, say: Say = lambda _: None) -> Path:
    """What Core ML compiles of a package for this Mac, in `folder`; only what is there is used.

    It is compiled under another name and renamed, so that an interrupted compile counts for
    nothing. Raises UsageError elsewhere than on a Mac, and where Core ML refuses.
    """
    require_mac()
    target = folder / f"{package.stem}{COMPILED_SUFFIX}"
    if target.exists():
        return target
    say(f"compiling {package.name} for this Mac (once)")
    with TemporaryDirectory(prefix=f".{package.stem}.", suffix=".partial", dir=folder) as partial:
        fresh = Path(partial) / target.name
        try:
            tools().ct.models.utils.compile_model(str(package), str(fresh))
        except RuntimeError as error:
            raise UsageError(f"{package.name}: cannot be compiled ({first_line(error)})") from error
        try:
            fresh.rename(target)
        except OSError:
            if not target.exists():  # or another process was faster
                raise
    return target


class CoreMLPackage:
    """One package on the chosen compute units, by their name in UNITS.

    Raises UsageError where Core ML cannot load or run it.
    """

    def __init__(self, package: Path, compiled: Path, units: str) -> None:
        self.interface = interface(package)
        self.functions = tuple(self.interface)
        self._name, self._compiled = package.name, str(compiled)
        self._units = getattr(tools().ct.ComputeUnit, UNITS[units])
        self.model = cache(self._load)

    def _load(self, function: str) -> Any:
        """A CompiledMLModel. A package with one function is asked for none."""
        asked = function if len(self.functions) > 1 else None
        try:
            return tools().ct.models.CompiledMLModel(
                self._compiled, compute_units=self._units, function_name=asked
            )
        except RuntimeError as error:
            raise UsageError(
                f"{self._name}: Core ML cannot load it ({first_line(error)})"
            ) from error

    def new_state(self, function: str) -> Any:
        """A state of zeros; functions with the same states can share it."""
        return self.model(function).make_state()

    def read(self, state: Any, name: str) -> np.ndarray:
        """What a state holds under a name."""
        return np.asarray(state.read_state(name))

    def write(self, state: Any, name: str, values: np.ndarray) -> None:
        """Put values at the start of a state, along each of its axes."""
        whole = np.array(state.read_state(name))
        whole[tuple(map(slice, values.shape))] = values
        state.write_state(name, whole)

    def run(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name; a picture is an array [1, 3, H, W] of 0..255."""
        model, arguments = self.model(function), [self.entered(function, inputs)]
        if state is not None:
            arguments.append(state)
        try:
            return dict(model.predict(*arguments))
        except RuntimeError as error:
            raise UsageError(
                f"{self._name}: Core ML cannot run it ({first_line(error)})"
            ) from error

    def entered(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Inputs as coremltools takes them: pictures as Pillow's, numbers as arrays."""
        kinds = {entry["name"]: entry["kind"] for entry in self.interface[function]["inputs"]}
        return {
            name: _picture(array) if kinds[name] == "image" else np.ascontiguousarray(array)
            for name, array in inputs.items()
        }


def _picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array[0].transpose(1, 2, 0)).astype(np.uint8))
