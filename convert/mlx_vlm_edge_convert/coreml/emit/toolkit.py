"""coremltools, imported here and nowhere else, quietly and without torch.

It is the extra `coreml`: without it there is one line that says so.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from mlx_vlm_edge.errors import UsageError

# Front ends that coremltools imports where it finds them; none is used, and torch costs seconds.
_UNUSED = ("torch", "tensorflow", "sklearn", "xgboost", "libsvm")


@dataclass(frozen=True)
class Tools:
    """ct: coremltools. mb: the MIL Builder. types: MIL's."""

    ct: Any
    mb: Any
    types: Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of coremltools' progress bars and notes on the terminal; errors are raised anyway."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Modules that are not imported yet cannot be, for a moment."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


MISSING = "Core ML export needs coremltools: pip install coremltools"


@cache
def tools() -> Tools:
    """The parts of coremltools that the exporter uses. Raises UsageError when it is missing."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        with quiet(), _without(_UNUSED):
            ct = import_module("coremltools")
            mil = import_module("coremltools.converters.mil")
            types = import_module("coremltools.converters.mil.mil.types")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "coremltools":
            raise
        raise UsageError(MISSING) from None
    require_library("libmilstoragepython")
    return Tools(ct, mil.Builder, types)


def require_library(name: str) -> None:
    """Raises UsageError where coremltools lacks a native library: pip built it from its sources."""
    try:
        with _without(_UNUSED):
            import_module(f"coremltools.{name}")
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UsageError(
            f"coremltools came without its library {name}, as where it has no wheel for Python "
            f"{version}: pip install --only-binary=:all: coremltools, with a Python that it knows"
        ) from None
