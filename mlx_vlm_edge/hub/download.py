"""Downloads from the Hugging Face Hub: sizes first, then only the files a model needs, checked.

The one module that imports huggingface_hub; progress goes to stderr.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from .. import whole_file
from ..checkpoint.files import CONFIG, FORMATS, OPEN_CLIP_CONFIG, lacking, needed
from ..errors import UnreachableError, UsageError
from ..wording import first_line, gigabytes
from . import published
from .cache import cache_folder, repository_folder
from .published import PublishedFile

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_COMMIT = re.compile("[0-9a-f]{40}")
_SPARE_BYTES = 256 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Remote:
    """A model on the Hub: its commit, the files that would be downloaded, and its licence."""

    repo: str
    commit: str
    files: Mapping[str, PublishedFile]
    licence: str

    @property
    def nbytes(self) -> int:
        """What a download takes."""
        return sum(file.size for file in self.files.values())


def describe(repo: str, revision: str | None = None) -> Remote:
    """Look a model up on the Hub. Raises UsageError when it is not there or out of reach."""
    with _explained(repo, revision):
        from huggingface_hub import HfApi

        model = HfApi().model_info(repo, revision=revision, files_metadata=True)
        siblings = {item.rfilename: item for item in model.siblings or []}
        names = needed(siblings)
        described = {CONFIG, OPEN_CLIP_CONFIG} & {*names}
        if not described or not any(form.among(names) for form in FORMATS):
            raise UsageError(f"{repo} is not a model: it has no {CONFIG} with weights beside it")
        files = {name: _published(siblings[name]) for name in names}
        if not _COMMIT.fullmatch(str(model.sha)):
            raise ValueError(f"commit {model.sha!r}")
        return Remote(repo, str(model.sha), files, _licence(model))


def download(repo: str, revision: str | None = None) -> Path:
    """Download what is missing of a model, with progress; the snapshot's folder.

    Says name and size first. What comes is held to the Hub's hashes, and what is here with other
    bytes is fetched again. Raises UsageError when the model is not there or out of reach, when the
    cache cannot be written or the disk is too small, and when what came is not a model.
    """
    target = cache_folder()
    with _explained(repo, revision):
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    remote = describe(repo, revision)
    snapshot = repository_folder(repo) / "snapshots" / remote.commit
    _check_room(remote, target)
    with _explained(repo, revision):
        published.write(snapshot, remote.files)
        for _ in range(2):
            wrong = _fetch(remote, revision, target)
            if not wrong:
                break
            print(f"{', '.join(wrong)}: not the Hub's bytes", file=sys.stderr)
            for name in wrong:
                _forget(snapshot / name)
    if wrong:
        raise UsageError(f"{repo}: {wrong[0]} does not come as the Hub says it is: try again later")
    if reason := lacking(snapshot, as_published=True):
        raise UsageError(f"{repo} is not a whole model: {reason}")
    _clear(repository_folder(repo) / "blobs", remote.files)
    whole_file.settle_tree(repository_folder(repo))  # huggingface_hub leaves it to the system
    whole_file.settle_folder(target)
    return snapshot


def _fetch(remote: Remote, revision: str | None, target: Path) -> list[str]:
    """Download what is missing; the files whose bytes are not the Hub's."""
    from huggingface_hub import snapshot_download

    fetch = partial(
        snapshot_download,
        remote.repo, revision=revision, allow_patterns=list(remote.files), cache_dir=target,
    )  # fmt: skip
    try:
        folder = _in_thread(fetch)
    except KeyboardInterrupt:
        here = gigabytes(remote.nbytes - _missing(remote))
        line = f"\n{here} of {gigabytes(remote.nbytes)} are here: the same command goes on"
        print(line, file=sys.stderr)
        raise
    if Path(folder).name != remote.commit:
        raise UsageError(f"{remote.repo} was changed meanwhile: pull it again")
    return published.differing(Path(folder), remote.files)


def _in_thread(call: Callable[[], str]) -> str:
    """Run a call in a thread: huggingface_hub answers Ctrl-C when all its files have come only."""
    result: Future[str] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # noqa: BLE001  (raised again where the result is awaited)
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result.result()


def _forget(file: Path) -> None:
    """Remove a file of a snapshot, and the blob that it links to."""
    blob = file.resolve()
    file.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _clear(blobs: Path, files: Mapping[str, PublishedFile]) -> None:
    """Remove what earlier downloads left of files that are whole now."""
    for leftover in blobs.glob("*.incomplete"):
        if any(file.hash and leftover.name.startswith(file.hash) for file in files.values()):
            leftover.unlink(missing_ok=True)


def _check_room(remote: Remote, target: Path) -> None:
    """Say what is downloaded. Raises UsageError when the disk has too little room for it."""
    missing = _missing(remote)
    free, size = shutil.disk_usage(target).free, gigabytes(missing)
    rest = "" if missing == remote.nbytes else f" more of {gigabytes(remote.nbytes)}"
    if missing + _SPARE_BYTES > free:
        raise UsageError(f"{remote.repo} takes {size}{rest}, {target} has {gigabytes(free)} free")
    line = f"downloading {remote.repo}: {size}{rest}, licence {remote.licence}"
    here = f"{remote.repo} is all here: its {gigabytes(remote.nbytes)} are checked"
    print(line if missing else here, file=sys.stderr)


def _missing(remote: Remote) -> int:
    """The bytes that a download has still to fetch."""
    home = repository_folder(remote.repo)
    absent = published.absent(home / "snapshots" / remote.commit, remote.files)
    blobs = {path.name for path in (home / "blobs").glob("*")}  # whole, and maybe not linked yet
    files = (remote.files[name] for name in absent)
    return sum(file.size for file in files if file.hash not in blobs)


def _published(sibling: "RepoSibling") -> PublishedFile:
    """What the Hub says of a file: an LFS file's sha256, git's hash of any other."""
    return published.checked(sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)


def _licence(model: "ModelInfo") -> str:
    card = model.card_data
    named = [tag.removeprefix("license:") for tag in model.tags or [] if tag.startswith("license:")]
    own = card.get("license_name") if card else None
    name = str(own or (named[0] if named else "not stated"))
    return "".join(filter(str.isprintable, name))


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's errors, each as one line with a remedy."""
    from huggingface_hub import errors

    # HfHubHTTPError's bases: the HTTP library's own root error, under whichever library it uses.
    unreachable: Any = (*errors.HfHubHTTPError.__bases__, OSError)
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{repo} asks for its licence to be accepted: do so at https://huggingface.co/{repo}, "
            "then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repo} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{repo} is not on the Hugging Face Hub, or private (`hf auth login`)"
        ) from error
    except unreachable as error:
        reason = first_line(error)
        if isinstance(error, OSError) and (error.filename or error.errno in _FULL):
            raise UsageError(
                f"{cache_folder()}: cannot be written ({error.strerror}); HF_HUB_CACHE names "
                "another folder to keep models in"
            ) from error
        raise UnreachableError(
            f"{repo}{at} is not on this machine and the Hub cannot be reached ({reason}); "
            "connect to the network, or name a folder that has the model"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{repo}: the Hub's answer cannot be used ({first_line(error)})"
        ) from error
