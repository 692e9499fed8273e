"""The vision back end's packages on this machine: one folder for all, one in it for each package.

A package's folder is named by all that decides what is in it, the exporter's own sources included.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_vlm_edge import errors
from mlx_vlm_edge.paths import expand_all, user_cache

from ..emit.toolkit import MISSING
from ..part import Compute, Precision, Size

ABOUT = "about.json"
VARIABLE = "MLX_VLM_EDGE_CACHE"  # names another folder than ~/.cache/mlx-vlm-edge/coreml
# What decides which program a tower becomes: modules and their folding, and what emits them.
_RUNTIME = ("vision", "connectors", "models")
_EXPORTER = ("emit", "package", "parts", "names.py", "part.py")


def folder() -> Path:
    """Where exported packages are kept."""
    if chosen := os.environ.get(VARIABLE):
        return expand_all(chosen)
    return user_cache() / "mlx-vlm-edge" / "coreml"


def key(weights: str, size: Size, precision: Precision, compute: Compute) -> str:
    """The name of a package's folder. weights: their `checkpoint.identity`; size: (H, W)."""
    return _digest([exporter(), weights, *size, precision, compute], 24)


@cache
def exporter() -> str:
    """Of the sources that a package depends on, and of coremltools.

    Raises UsageError when that is missing.
    """
    here, runtime = Path(__file__).parents[1], Path(errors.__file__).parent
    rooms = [*(here / room for room in _EXPORTER), *(runtime / room for room in _RUNTIME)]
    try:
        tools = version("coremltools")
    except PackageNotFoundError:
        raise errors.UsageError(MISSING) from None
    return sources(rooms, tools)


def sources(rooms: list[Path], *more: str) -> str:
    """The sha256 of Python files, and of those in folders; names in it, places not."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for room in rooms:
        for path in sorted(room.rglob("*.py")) if room.is_dir() else [room]:
            digest.update(path.relative_to(room.parent).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A folder of the cache. about: what it says of itself; empty for what a kill left behind."""

    folder: Path
    nbytes: int
    about: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its key, by which it is removed."""
        return self.folder.name

    @property
    def description(self) -> str:
        """What it was exported of and for; of what is in it when that is not known."""
        if not self.about:
            return "unfinished, or of an older version"
        height, width = self.about["size"]
        return (
            f"{self.about['model']}, {width}x{height}, {self.about['precision']}, "
            f"{self.about['compute']}"
        )


def describe(entry: Path, **about: Any) -> None:
    """Write into a new folder what `Entry` reads."""
    (entry / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def entries() -> list[Entry]:
    """All that is in the cache, what is unfinished or damaged included; the largest first."""
    root = folder()
    paths = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(map(_entry, paths), key=lambda entry: (-entry.nbytes, entry.name))


def _entry(path: Path) -> Entry:
    files = [each for each in path.rglob("*") if each.is_file()]
    nbytes = sum(each.stat().st_size for each in files)
    about = _about(path) if not path.name.startswith(".") else {}
    return Entry(path, nbytes, about)


def _about(path: Path) -> Mapping[str, Any]:
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        height, width = map(int, about["size"])
        texts = {key: str(about[key]) for key in ("model", "precision", "compute")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return {**texts, "size": (height, width)}


def clear(chosen: Iterable[Entry]) -> None:
    """Remove folders of the cache, and lock files that belong to none.

    What another process is exporting now stays.
    """
    for entry in chosen:
        if not _in_use(entry.folder):
            _remove(entry.folder)
    for lock in folder().glob(".*.lock"):
        package = folder() / lock.name.removeprefix(".").removesuffix(".lock")
        if not package.exists() and not _in_use(package):
            lock.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a package's folder: it is none from the first moment on."""
    if not path.name.startswith("."):
        unfinished = path.with_name(f".{path.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        path = path.rename(unfinished)
    shutil.rmtree(path)


def _in_use(path: Path) -> bool:
    """Whether a process holds the lock that `new_folder` takes for a folder, done or not."""
    key = path.name.removeprefix(".").partition(".")[0]
    try:
        with (path.parent / f".{key}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def label(checkpoint: Path) -> str:
    """A folder's name, or the repository's where it is a snapshot in the Hub's cache."""
    if checkpoint.parent.name != "snapshots":
        return checkpoint.resolve().name
    return checkpoint.parents[1].name.removeprefix("models--").replace("--", "/")


def _digest(content: object, length: int) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]
