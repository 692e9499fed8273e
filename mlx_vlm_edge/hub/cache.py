"""What is on this machine: the Hub cache, read without huggingface_hub."""

import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import CONFIG, OPEN_CLIP_CONFIG, lacking, read_json
from ..errors import UsageError
from ..paths import expand_all, user_cache
from . import published

_REVISION = re.compile(r"[\w./-]+")


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
            return expand_all(folder)
    if home := environment.get("HF_HOME"):
        return expand_all(home) / "hub"
    return user_cache() / "huggingface" / "hub"


def repository_folder(repo: str) -> Path:
    """Where the cache has a repository, if it has it."""
    return cache_folder() / ("models--" + repo.replace("/", "--"))


def local_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a complete snapshot in the Hub cache, None when there is none.

    revision: a branch, a tag or a whole commit hash; the main branch by default.
    """
    snapshot = snapshot_folder(repo, revision)
    return snapshot if is_complete(snapshot) else None


def snapshot_folder(repo: str, revision: str | None = None) -> Path:
    """Where the cache has a snapshot, whole or not, or would have it."""
    wanted = revision or "main"
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise UsageError(f"revision {wanted!r} is not a branch, a tag or a commit")
    home = repository_folder(repo)
    reference = home / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    return home / "snapshots" / commit


def whole_snapshot(repo: str) -> Path | None:
    """The newest snapshot of any revision that is complete."""
    return next(filter(is_complete, reversed(_snapshots(repository_folder(repo)))), None)


def usable_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """What a model is run from where the Hub cannot be asked: a whole older snapshot will do, as
    an update that was stopped leaves it, unless a revision was named."""
    named = local_snapshot(repo, revision)
    return named or (whole_snapshot(repo) if revision is None else None)


def _snapshots(home: Path) -> list[Path]:
    """A repository's snapshots, the newest last; a system puts files of its own beside them."""
    folders = (path for path in (home / "snapshots").glob("*") if path.is_dir())
    return sorted(folders, key=lambda path: path.stat().st_mtime)


def is_complete(snapshot: Path) -> bool:
    """Whether a snapshot is a whole model, and has every file that its repository has of one."""
    files = published.read(snapshot)
    return not (published.absent(snapshot, files) or lacking(snapshot, as_published=bool(files)))


def cached_models(named: Container[str] = ()) -> Iterator[CachedModel]:
    """Every model in the Hub cache that a family of ours can read, or that was pulled by us.

    named: repositories that count without a config as well, which a download may not have reached.
    """
    cache = cache_folder()
    for home in sorted(cache.glob("models--*--*")) if cache.is_dir() else []:
        repo = home.name.removeprefix("models--").replace("--", "/", 1)
        latest = (_snapshots(home) or [home / "snapshots" / "none"])[-1]
        if not (published.recorded(home) or _supported(latest, repo in named)):
            continue
        blobs = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
        nbytes = sum(path.stat().st_size for path in blobs)
        yield CachedModel(repo, home, nbytes, is_complete(latest))


def remove(model: CachedModel) -> None:
    """Remove a model from the cache. Without configs first: nothing is whole from then on."""
    for name in (CONFIG, OPEN_CLIP_CONFIG):
        for config in model.folder.glob(f"snapshots/*/{name}"):
            config.unlink()
    shutil.rmtree(model.folder)


def _supported(snapshot: Path, without_config: bool) -> bool:
    from ..models import FAMILIES

    try:
        config = read_json(snapshot / CONFIG)
    except UsageError:
        return without_config
    return config.get("model_type") in FAMILIES if config else without_config
