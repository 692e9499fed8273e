"""Files that appear whole or not at all, and are there after a loss of power: the one way to write.

Content is written beside its place under a hidden name, brought to the disk, and renamed. What a
killed process left there goes when the same file is written again.
"""

import errno
import glob
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

_PARTIAL = ".partial"
_numbers = count()  # threads of one process may write the same file


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Callable[[bytes], None]]:
    """Give a function that puts content at `path`; until it was called what is there stays.

    The hidden file is made at once, so that a place that cannot be written raises OSError now.
    A link stays one; a device, a pipe or a file that is mounted is written to. mode: permissions of
    a new file, of which the process's mask is taken; one that is there keeps its own.
    """
    there = path.exists()
    if there and not path.is_file():
        yield lambda content: _write_through(path, content)
        return
    path = path.resolve()
    remove_abandoned(path.parent, path.name)
    partial = partial_name(path)
    first = 0o600 if there else mode
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, first))

    def put(content: bytes) -> None:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            settle(file.fileno())
        if path.exists():
            take_after(partial, path)
        try:
            partial.replace(path)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a mount: its file can be filled, and not exchanged
                raise
            _write_through(path, content)
        settle_folder(path.parent)

    try:
        yield put
    finally:
        partial.unlink(missing_ok=True)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)


def take_after(new: Path, old: Path) -> None:
    """Give a file or folder the permissions of the one whose place it takes, and its owner and
    group, each where this process and the file system may."""
    was = old.stat()
    for owner in (was.st_uid, -1):
        with suppress(OSError):
            os.chown(new, owner, was.st_gid)
            break
    with suppress(OSError):
        new.chmod(stat.S_IMODE(was.st_mode))


def write(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Put content at `path` in one step; text as UTF-8. mode: see `replacing`. Raises OSError."""
    with replacing(path, mode) as put:
        put(content.encode() if isinstance(content, str) else content)


def partial_name(path: Path) -> Path:
    """A hidden name beside `path` that says whose it is, for what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}{_PARTIAL}")


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove the hidden files of processes that are no more; name: of one file's only."""
    pattern = name if name == "*" else glob.escape(name)
    for partial in folder.glob(f".{pattern}.*-*{_PARTIAL}"):
        if not _alive(partial.name.removesuffix(_PARTIAL).rpartition(".")[2].partition("-")[0]):
            partial.unlink(missing_ok=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def settle(descriptor: int) -> None:
    """Bring an open file to the disk, past the disk's own cache where the system can."""
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a file system without it
            pass
    os.fsync(descriptor)


def settle_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        settle(descriptor)
    except OSError:  # some file systems have it done, and refuse
        pass
    finally:
        os.close(descriptor)


def settle_tree(folder: Path) -> None:
    """Bring all that is in a folder to the disk, and the folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                settle(file.fileno())
        elif path.is_dir():
            settle_folder(path)
    settle_folder(folder)
