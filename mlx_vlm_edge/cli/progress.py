"""What a prompt that takes long is at, on the last line of a terminal; nothing anywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..generation.progress import Progress

DELAY = 2.0  # seconds before anything is said
EVERY = 0.25  # seconds


class Shown:
    """Shows progress until `end`. `progress` is None where standard error is no terminal."""

    def __init__(self, delay: float = DELAY) -> None:
        self.progress = _progress()
        self._over = Event()
        self._thread: Thread | None = None
        if self.progress is not None:
            self._thread = Thread(target=self._show, args=(self.progress, delay), daemon=True)
            self._thread.start()

    def _show(self, progress: "Progress", delay: float) -> None:
        shown, wait = "", delay
        while not self._over.wait(wait):
            if progress.text != shown:
                shown, wait = progress.text, EVERY
                print(f"\r{shown}\x1b[K", end="", file=sys.stderr, flush=True)
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Before anything else is printed; more than once does no harm."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()


def _progress() -> "Progress | None":
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from ..generation.progress import Progress

    return Progress()


@contextmanager
def shown() -> Iterator[Shown]:
    """Progress, ended at the latest at the end."""
    line = Shown()
    try:
        yield line
    finally:
        line.end()
