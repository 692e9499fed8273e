"""A saved package on a Mac: Core ML computes, through coremltools; the calls are the interpreter's.

A package is compiled for the Mac first, and loaded once for each of its functions that is called.
"""

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_edge.errors import UsageError

from ..emit.toolkit import tools
from ..package.interface import interface

UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu-gpu": "CPU_AND_GPU", "cpu-ne": "CPU_AND_NE"}


def compiled(package: Path, folder: Path) -> Path:
    """Compile a package for this Mac, in `folder`. Raises UsageError elsewhere, and where it fails.

    What was compiled there before is used again.
    """
    require_mac()
    target = folder / f"{package.stem}.mlmodelc"
    if not target.exists():
        try:
            tools().ct.models.utils.compile_model(str(package), str(target))
        except RuntimeError as error:
            raise UsageError(f"{package.name}: cannot be compiled ({_line(error)})") from error
    return target


def require_mac() -> None:
    """Raises UsageError where there is no Core ML."""
    if sys.platform != "darwin":
        raise UsageError("Core ML runs packages on a Mac only, and this is none")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class Device:
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
            raise UsageError(f"{self._name}: Core ML cannot load it ({_line(error)})") from error

    def new_state(self, function: str) -> Any:
        """A state of zeros; functions with the same states can share it."""
        return self.model(function).make_state()

    def run(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        """Outputs by name; a picture is an array [1, 3, H, W] of 0..255."""
        model, given = self.model(function), self.entered(function, inputs)
        try:
            return dict(model.predict(given) if state is None else model.predict(given, state))
        except RuntimeError as error:
            raise UsageError(f"{self._name}: Core ML cannot run it ({_line(error)})") from error

    def entered(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Inputs as coremltools takes them: pictures as Pillow's, numbers as arrays."""
        kinds = {entry["name"]: entry["kind"] for entry in self.interface[function]["inputs"]}
        return {
            name: _picture(array) if kinds[name] == "image" else np.ascontiguousarray(array)
            for name, array in inputs.items()
        }


def _picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array[0].transpose(1, 2, 0)).astype(np.uint8))
