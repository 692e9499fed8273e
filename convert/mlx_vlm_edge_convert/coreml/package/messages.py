"""The protobuf classes of the Core ML format, without importing the rest of coremltools.

coremltools carries them in a folder of their own; importing all of it takes seconds.
"""

import importlib.util
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_vlm_edge.errors import UsageError

_OWNER, _FOLDER = "coremltools", "coremltools.proto"


def parse(content: bytes) -> Any:
    """The message of a `.mlmodel` file. Raises ValueError when the bytes are none."""
    message = model_class()()
    try:
        message.ParseFromString(content)
    except import_module("google.protobuf.message").DecodeError as error:
        raise ValueError(str(error)) from error
    return message


@cache
def model_class() -> Any:
    """The class of a `.mlmodel` file. Raises UsageError when coremltools is missing."""
    if _OWNER in sys.modules:
        return import_module(f"{_FOLDER}.Model_pb2").Model
    spec = importlib.util.find_spec(_OWNER)
    if spec is None or spec.origin is None:
        raise UsageError("Core ML packages are read with coremltools: pip install coremltools")
    root = Path(spec.origin).parent
    before = set(sys.modules)
    for name, folder in ((_OWNER, root), (_FOLDER, root / "proto")):
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [str(folder)]
    try:
        return import_module(f"{_FOLDER}.Model_pb2").Model
    finally:  # so that a later import of coremltools finds nothing half-made
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == _OWNER:
                del sys.modules[name]
