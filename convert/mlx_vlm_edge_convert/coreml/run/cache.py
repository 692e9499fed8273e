"""The vision back end's packages on this machine: one folder for all, one in it for each package.

A package's folder is named by all that decides what is in it, the exporter's own sources included.
"""

import hashlib
import json
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mlx_vlm_edge import errors

from ..part import Compute, Precision, Size

VARIABLE = "MLX_VLM_EDGE_CACHE"  # names another folder than ~/.cache/mlx-vlm-edge/coreml
# What decides which program a tower becomes: modules and their folding, and what emits them.
_RUNTIME = ("vision", "connectors", "models")
_EXPORTER = ("emit", "package", "parts", "names.py", "part.py")


def folder() -> Path:
    """Where exported packages are kept."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mlx-vlm-edge" / "coreml"


def key(weights: str, size: Size, precision: Precision, compute: Compute) -> str:
    """The name of a package's folder. weights: their `checkpoint.identity`; size: (H, W)."""
    return _digest([exporter(), weights, *size, precision, compute], 24)


@cache
def exporter() -> str:
    """Of the sources that a package depends on, and of coremltools."""
    here, runtime = Path(__file__).parents[1], Path(errors.__file__).parent
    rooms = [*(here / room for room in _EXPORTER), *(runtime / room for room in _RUNTIME)]
    return sources(rooms, version("coremltools"))


def sources(rooms: list[Path], *more: str) -> str:
    """The sha256 of Python files, and of those in folders; names in it, places not."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for room in rooms:
        for path in sorted(room.rglob("*.py")) if room.is_dir() else [room]:
            digest.update(path.relative_to(room.parent).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _digest(content: object, length: int) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]
