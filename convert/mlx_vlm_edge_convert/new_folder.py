"""A folder that appears whole or not at all, and takes another's place in one step.

It is written beside its place under a temporary name, by one process at a time. What a killed one
left there is put right or removed by the next.
"""

import ctypes
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.system_files import of_the_system
from mlx_vlm_edge.whole_file import settle_folder, settle_tree, take_after

# A folder -> the files in it that we wrote, by a manifest of ours; none where it has none.
Listed = Callable[[Path], Container[str]]
_SWAP = 2  # RENAME_SWAP of macOS, RENAME_EXCHANGE of Linux
_HERE = -100  # Linux's AT_FDCWD


def check_target(target: Path, *, overwrite: bool, listed: Listed) -> None:
    """Raises UsageError unless a folder may be written there.

    With `overwrite` it may be one in which there is nothing but what we wrote. What a killed
    process left beside it is put right first.
    """
    place = target.resolve()
    with suppress(UsageError, OSError):  # a process that still runs sees to its own
        if _lock_file(place).exists():
            with _locked(place):
                _put_right(place, *_beside(place))
    _check(target, overwrite=overwrite, listed=listed)


def _check(target: Path, *, overwrite: bool, listed: Listed) -> None:
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; name a folder to write to")
    if not target.is_dir():
        return
    if reason := _fixed(target):
        raise UsageError(f"{target} is {reason}, which is not replaced: name a folder in it")
    if _is_empty(target):
        return
    if not overwrite:
        raise UsageError(f"{target} is not empty; name another folder or add --overwrite")
    ours = listed(target)
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if not path.is_dir() and not of_the_system(path.name) and name not in ours:
            raise UsageError(
                f"{target} has other things than a model of ours in it ({name}): move them away, "
                "or name another folder"
            )


def _is_empty(folder: Path) -> bool:
    return all(of_the_system(path.name) and path.is_file() for path in folder.iterdir())


def _fixed(target: Path) -> str | None:
    """Why another folder cannot take a folder's place in one step, None where it can."""
    if os.path.ismount(target):
        return "where a disk is mounted"
    try:
        here = Path.cwd()
    except FileNotFoundError:  # removed by another
        return None
    if target.samefile(here):
        return "the current folder"
    above = any(target.samefile(folder) for folder in here.parents)
    return "above the current folder" if above else None


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False, listed: Listed) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is removed otherwise.
    Where `target` is there, its permissions stay.

    overwrite, listed: see `check_target`. Raises UsageError when the target is in the way, cannot
    be made, or is being written by another process.
    """
    target = target.resolve()
    partial, old = _beside(target)
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _put_right(target, partial, old)
            _check(target, overwrite=overwrite, listed=listed)
            try:
                partial.mkdir(0o700 if target.is_dir() else 0o777)
                if target.is_dir():
                    take_after(partial, target)
                yield partial
                settle_tree(partial)
                _replace(target, partial, old)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _beside(target: Path) -> tuple[Path, Path]:
    """Where a new folder is written, and where the old one is for a moment."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold a lock file beside the target. Raises UsageError when another process does."""
    path = _lock_file(target)
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UsageError(f"{target} is being written by another process") from None
        with suppress(FileNotFoundError):  # whoever held it removed it meanwhile
            if path.stat().st_ino == os.fstat(file).st_ino:
                break
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _put_right(target: Path, partial: Path, old: Path) -> None:
    """Remove what a killed process left, or put the target back that it had moved aside."""
    shutil.rmtree(partial, ignore_errors=True)
    if old.is_dir() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _replace(target: Path, partial: Path, old: Path) -> None:
    """Put what was written at its place, on the disk before anything of the old one goes."""
    if not target.exists():
        partial.rename(target)
    elif not _swap(target, partial):  # then there is a moment without a target
        target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            old.rename(target)
            raise
    settle_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, two: Path) -> bool:
    """Swap the names of two folders in one step; False where system or disk cannot."""
    libc, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(two))
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(*names, _SWAP) == 0)
        return bool(libc.renameat2(_HERE, names[0], _HERE, names[1], _SWAP) == 0)
    except AttributeError:
        return False
