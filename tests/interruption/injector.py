"""Ends this process at its n-th operation on files in a folder, as kill -9 or lost power does.

In go a folder, a number and a kind of end; out comes a process that is gone (exit code 9) or, where
the number is larger than the operations are, the count of them and what a loss of power would still
have cost. Operations of os, pathlib, shutil, tempfile, mx.save_safetensors and `new_folder` count.

A loss of power is a kill after which every file has only what was fsynced of it. Lost renames need
no model: the state without the last of them is that of an earlier kill.
"""

import builtins
import io
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

KILLED = 9  # exit code
_PATHS = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "truncate", "link", "symlink")
_MOVES = ("rename", "replace", "symlink", "link")
_REAL_OPEN, _REAL_OS = io.open, {name: getattr(os, name) for name in (*_PATHS, "open", "fsync")}
_REAL_SENDFILE = getattr(os, "sendfile", None)


class Injector:
    """Counts operations below `root` and ends the process at number `point`, 0 for never.

    power: files lose what was not fsynced.
    """

    def __init__(self, root: Path, point: int = 0, power: bool = False) -> None:
        self.root, self.left, self.power = str(root.resolve()), point, power
        self.count = 0
        self.names: list[str] = []
        self.unsettled: set[str] = set()  # folders that something was moved into since their fsync
        self._safe: dict[int, int] = {}  # inode -> bytes that a loss of power leaves
        self._seen: dict[int, tuple[int, int]] = {}  # inode -> (size, time) before
        self._lock = RLock()
        for path in self._files():
            found = path.stat()
            self._seen[found.st_ino] = (found.st_size, found.st_mtime_ns)
            self._safe[found.st_ino] = found.st_size

    def arm(self) -> None:
        """From here on operations count."""
        io.open = builtins.open = sys.modules["_io"].open = self._opened  # type: ignore[assignment]
        for name in _PATHS:
            setattr(os, name, self._path_operation(name))
        os.open, os.fsync = self._os_open, self._fsync
        if _REAL_SENDFILE:
            os.sendfile = self._sendfile
        if "mlx.core" in sys.modules:
            import mlx.core as mx

            self._wrap(mx, "save_safetensors", self._saved)
        if module := sys.modules.get("mlx_vlm_edge_convert.new_folder"):
            self._wrap(module, "_swap", self._swapped)

    def point(self, name: str, half: Callable[[], object] | None = None) -> None:
        """An operation is about to be done; `half` does some of it."""
        with self._lock:
            self.count += 1
            self.names.append(name)
            self.left -= 1
            if self.left == 0:
                if half is not None:
                    half()
                if self.power:
                    self._lose()
                os._exit(KILLED)

    def unsynced(self) -> list[str]:
        """Files of which a loss of power would take something now."""
        lost = [str(path) for path in self._files() if self._kept(path) < path.stat().st_size]
        return sorted(os.path.relpath(path, self.root) for path in lost)

    def _lose(self) -> None:
        for path in self._files():
            kept = self._kept(path)
            if kept < path.stat().st_size:
                _REAL_OS["truncate"](path, kept)

    def _kept(self, path: Path) -> int:
        """How many of a file's bytes are on the disk for certain."""
        found = path.stat()
        if self._seen.get(found.st_ino) == (found.st_size, found.st_mtime_ns):
            return found.st_size
        return min(self._safe.get(found.st_ino, 0), found.st_size)

    def _files(self) -> list[Path]:
        paths = Path(self.root).rglob("*")
        return [path for path in paths if not path.is_symlink() and path.is_file()]

    def _inside(self, path: Any, folder: int | None = None) -> bool:
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            elif folder is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
            path = os.path.abspath(os.fsdecode(path))
        except (OSError, TypeError):
            return False
        return path == self.root or path.startswith(self.root + os.sep)

    def _forget(self, path: Any, folder: int | None = None) -> None:
        """A file goes, and its inode may be another's next."""
        try:
            found = os.stat(path, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return
        if found.st_nlink <= 1 and stat.S_ISREG(found.st_mode):
            self._seen.pop(found.st_ino, None)
            self._safe.pop(found.st_ino, None)

    def _path_operation(self, name: str) -> Callable[..., Any]:
        real = _REAL_OS[name]

        def operation(path: Any, *more: Any, **named: Any) -> Any:
            subject = more[0] if name in ("link", "symlink") else path
            folder = named.get("dir_fd")
            if not self._inside(subject, folder):
                return real(path, *more, **named)
            self.point(f"{name} {os.path.basename(os.fsdecode(subject))}")
            if name in ("unlink", "remove"):
                self._forget(path, folder)
            elif name in ("rename", "replace"):
                self._forget(more[0])
            done = real(path, *more, **named)
            if name in _MOVES:
                self.unsettled.add(os.path.dirname(os.path.abspath(os.fsdecode(more[0]))))
            return done

        return operation

    def _os_open(self, path: Any, flags: int, *more: Any, **named: Any) -> int:
        writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing and self._inside(path, named.get("dir_fd")):
            self.point(f"open {os.path.basename(os.fsdecode(path))}")
            new = not os.path.exists(path)
            descriptor = _REAL_OS["open"](path, flags, *more, **named)
            self._begin(descriptor, empty=bool(flags & os.O_TRUNC), new=new)
            return descriptor
        return _REAL_OS["open"](path, flags, *more, **named)

    def _begin(self, descriptor: int, *, empty: bool, new: bool) -> None:
        inode = os.fstat(descriptor).st_ino
        if empty or new:
            self._seen.pop(inode, None)
            self._safe[inode] = 0

    def _fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if self._inside(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.point(f"fsync {os.path.basename(path)}")
            self.unsettled.discard(path)
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                self._safe[found.st_ino] = found.st_size
            return  # the disk itself is not tried
        _REAL_OS["fsync"](descriptor)

    def _sendfile(self, out: int, source: int, offset: int, count: int) -> int:
        if self._inside(out):
            half = max(count, 2) // 2
            self.point("copy")
            self.point("copy", lambda: _REAL_SENDFILE(out, source, offset, min(half, 100)))
        return _REAL_SENDFILE(out, source, offset, count)

    def _wrap(self, module: Any, name: str, wrapper: Callable[..., Any]) -> None:
        real = getattr(module, name)
        setattr(module, name, lambda *args, **named: wrapper(real, *args, **named))

    def _saved(self, real: Callable[..., None], path: Any, *more: Any, **named: Any) -> None:
        if not self._inside(path):
            return real(path, *more, **named)

        def half() -> None:
            real(path, *more, **named)
            _REAL_OS["truncate"](path, os.path.getsize(path) // 2)

        self.point(f"save {os.path.basename(path)}")
        self.point(f"save half of {os.path.basename(path)}", half)
        return real(path, *more, **named)

    def _swapped(self, real: Callable[..., bool], one: Path, two: Path) -> bool:
        self.point(f"swap {one.name}")
        done = real(one, two)
        if done:
            self.unsettled.add(str(one.parent))
        return done

    def _opened(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, closefd: bool = True,
        opener: Any = None,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+") or not self._inside(file):
            return _REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        new = False
        if not isinstance(file, int):
            self.point(f"open {os.path.basename(os.fsdecode(file))}")
            new = not os.path.exists(file)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.injector = self
        self._begin(raw.fileno(), empty="w" in mode, new=new)
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, encoding, errors, newline)


class _Raw(io.FileIO):
    """A file whose every write counts, before and in its middle."""

    injector: Injector

    def write(self, data: Any) -> int:
        name = os.path.basename(str(self.name))
        self.injector.point(f"write {name}")
        middle = memoryview(data).cast("B")[: len(data) // 2]
        self.injector.point(f"write half of {name}", lambda: super(_Raw, self).write(middle))
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        if size is None or size != os.fstat(self.fileno()).st_size:
            self.injector.point("truncate")
        return super().truncate(size)
