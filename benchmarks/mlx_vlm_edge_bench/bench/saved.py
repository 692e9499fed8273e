"""A JSON file that appears whole or not at all, and is known to be writable before the work."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from mlx_vlm_edge import whole_file
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.paths import expand

STDOUT = "-"


class Save(Protocol):
    def __call__(self, content: Mapping[str, Any]) -> None: ...


@contextmanager
def writable(name: str | None) -> Iterator[Save]:
    """Give a function that writes a JSON object to the file; None: one that does nothing; "-": one
    that prints it on what standard output is now.

    As `replacing` has it: what cannot be written is a UsageError now.
    """
    if name == STDOUT:
        out = sys.stdout
        yield lambda content: print(json.dumps(content, ensure_ascii=False), file=out, flush=True)
        return
    with replacing("--json", name) as put:

        def save(content: Mapping[str, Any]) -> None:
            put((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

        yield save


@contextmanager
def replacing(flag: str, name: str | None) -> Iterator[Callable[[bytes], None]]:
    """Give a function that puts the file's content in its place; None: one that does nothing.

    The file is made under another name in its folder at once, so that a full or read-only disk
    or a wrong path is a UsageError now, which names the flag. Nothing is left when the function
    was not called.
    """
    if name is None:
        yield lambda content: None
        return
    path = expand(name)
    if path.is_dir():
        raise UsageError(f"{flag} {name}: is a folder; name a file in it")
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced
        raise UsageError(f"{flag} {name}: is no regular file; name another one")
    with ExitStack() as stack:
        try:
            put = stack.enter_context(whole_file.replacing(path))
        except OSError as error:
            raise UsageError(f"{flag} {name}: cannot be written ({error.strerror})") from None
        yield put
