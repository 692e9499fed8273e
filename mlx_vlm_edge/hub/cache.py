"""What is on this machine: the Hub cache, read without huggingface_hub."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

_REVISION = re.compile(r"[\w./-]+")
_WEIGHTS = {
    "model.safetensors.index.json": (".safetensors",),
    "pytorch_model.bin.index.json": (".bin", ".pth"),
}


@dataclass(frozen=True)
class CachedModel:
    """A model in the Hub cache: its id, its folder, the bytes it takes, whether it is complete."""

    repo: str
    folder: Path
    nbytes: int
    complete: bool


def cache_folder() -> Path:
    """The Hub cache, by the environment variables that huggingface_hub reads."""
    environment: Mapping[str, str] = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := environment.get(variable):
            return Path(folder).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "huggingface" / "hub"


def local_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a complete snapshot in the Hub cache, None when there is none.

    revision: a branch, a tag or a whole commit hash; the main branch by default.
    """
    wanted = revision or "main"
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise UsageError(f"revision {wanted!r} is not a branch, a tag or a commit")
    home = cache_folder() / _cache_name(repo)
    reference = home / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    snapshot = home / "snapshots" / commit
    return snapshot if is_complete(snapshot) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder has a config and all its weights: every shard of its index, or a file."""
    if not (folder / "config.json").is_file():
        return False
    for index, suffixes in _WEIGHTS.items():
        if (folder / index).is_file():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                return False
            return all((folder / str(shard)).is_file() for shard in shards)
        if any(path.suffix in suffixes and path.is_file() for path in folder.iterdir()):
            return True
    return False


def cached_models() -> Iterator[CachedModel]:
    """Every model in the Hub cache that a family of ours can read, or that is not all there."""
    cache = cache_folder()
    for home in sorted(cache.glob("models--*--*")) if cache.is_dir() else []:
        repo = home.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = sorted((home / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        if not snapshots or not _supported(snapshots[-1]):
            continue
        blobs = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
        nbytes = sum(path.stat().st_size for path in blobs)
        yield CachedModel(repo, home, nbytes, is_complete(snapshots[-1]))


def _supported(snapshot: Path) -> bool:
    from ..models import FAMILIES

    try:
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in FAMILIES


def _cache_name(repo: str) -> str:
    return "models--" + repo.replace("/", "--")
