"""What the Hub says a snapshot is made of: names, sizes and hashes, which what is here is held to.

The record is written before the first byte is fetched, so that a download that died is known.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import whole_file
from ..checkpoint.files import read_json
from ..errors import UsageError

_RECORDS = "mlx-vlm-edge"  # folder beside the cache's own snapshots, refs and blobs
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_BLOCK = 1 << 20


class PublishedFile(NamedTuple):
    """A file's bytes and hash: sha256 (64 digits, for large files) or git's (40); "" for none."""

    size: int
    hash: str


Files = Mapping[str, PublishedFile]


def write(snapshot: Path, files: Files) -> None:
    """Keep what the Hub says of a snapshot in the cache."""
    path = _record(snapshot)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole_file.write(path, json.dumps({"files": files}))


def read(snapshot: Path) -> Files:
    """What the Hub said of a snapshot; {} where nothing was kept, or it is damaged."""
    try:
        files = read_json(_record(snapshot)).get("files") or {}
        return {name: PublishedFile(*checked(size, hash)) for name, (size, hash) in files.items()}
    except (UsageError, AttributeError, TypeError, ValueError):
        return {}


def checked(size: Any, hash: Any) -> PublishedFile:
    """A size and a hash from outside. Raises ValueError for what cannot be one."""
    if type(size) is not int or size < 0:
        raise ValueError(f"size {size!r}")
    if hash and not (isinstance(hash, str) and (_SHA256.fullmatch(hash) or _GIT.fullmatch(hash))):
        raise ValueError(f"hash {hash!r}")
    return PublishedFile(size, hash or "")


def recorded(home: Path) -> bool:
    """Whether anything of a repository in the cache was asked for by us."""
    return any((home / _RECORDS).glob("*.json"))


def absent(snapshot: Path, files: Files) -> list[str]:
    """Files that are not in a snapshot, or are of another size."""
    return [name for name, file in files.items() if _size(snapshot / name) != file.size]


def differing(snapshot: Path, files: Files) -> list[str]:
    """Files that are not in a snapshot, or whose bytes are not those that the Hub has."""
    missing = absent(snapshot, files)
    return [
        name
        for name, file in files.items()
        if name in missing or (file.hash and digest(snapshot / name, file.hash) != file.hash)
    ]


def digest(path: Path, like: str) -> str:
    """The hash of a file, of the kind that another one is: sha256, or git's of a blob."""
    import hashlib

    with path.open("rb") as file:
        if _SHA256.fullmatch(like):
            return hashlib.file_digest(file, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while block := file.read(_BLOCK):
            blob.update(block)
        return blob.hexdigest()


def hashes_of(snapshot: Path) -> Files:
    """A snapshot's files with the hashes that name their blobs in the cache, without a record."""
    files = {}
    for path in sorted(snapshot.iterdir()):
        blob = path.resolve()
        if path.is_symlink() and (_SHA256.fullmatch(blob.name) or _GIT.fullmatch(blob.name)):
            size = blob.stat().st_size if blob.is_file() else 0
            files[path.name] = PublishedFile(size, blob.name)
    return files


def _record(snapshot: Path) -> Path:
    return snapshot.parents[1] / _RECORDS / f"{snapshot.name}.json"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
