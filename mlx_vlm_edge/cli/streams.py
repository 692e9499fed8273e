"""The program's standard streams and Ctrl-C, made safe while a verb runs."""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TextIO

from ..wording import printable

INTERRUPTED = 130  # exit code
STOPPING = "\nstopping when the step under way is done; Ctrl-C again stops at once"
PATIENCE = 0.2  # seconds until that is said


@contextmanager
def safe() -> Iterator[None]:
    _occupy()
    if isinstance(sys.stdin, io.TextIOWrapper):  # an answer to a question may have any bytes
        with suppress(OSError, ValueError):  # of a stream that is closed, or was read before
            sys.stdin.reconfigure(errors="surrogateescape")
    stdout, stderr = sys.stdout, sys.stderr
    sys.stderr = _Notes(stderr)
    try:
        if isinstance(stdout, io.TextIOWrapper):
            stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
            if stdout.isatty():
                sys.stdout = _Shown(stdout)
        with _second_interrupt_ends():
            yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr


def input_closed() -> bool:
    return sys.stdin is None or sys.stdin.closed


def piped() -> bytes:
    """All of standard input, which is not closed, as it was sent: no locale's text."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        return sys.stdin.buffer.read()
    return sys.stdin.read().encode(errors="surrogateescape")


def piped_text() -> str:
    """The same as the UTF-8 that it is in any locale; bytes that are none become surrogates."""
    return piped().decode(errors="surrogateescape")


def _occupy() -> None:
    """Give closed streams' numbers to /dev/null: as a file's number MLX takes 0 for none, and
    what is written to 1 and 2 by C would go into the file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


class _Notes(io.TextIOBase):
    """stderr; where it is closed or full, what is written is lost and the work goes on."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(printable(text, progress=True))
                self._stream.flush()
        return len(text)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        return 2 if self._stream is None else self._stream.fileno()


class _Shown(io.TextIOBase):
    """stdout at a terminal, which no answer and no name may command; a pipe gets them raw."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def buffer(self) -> BinaryIO:
        """For programs that command the terminal themselves, as an editor of lines does."""
        return self._stream.buffer


class _Interrupts:
    """Ctrl-C: the first raises KeyboardInterrupt, one more before it is answered ends the process.

    Python answers between its own steps only, and an evaluation of MLX's may be a long one: a
    thread that is told of signals at once does so in its place.
    """

    def __init__(self) -> None:
        self._seen = self._answered = 0

    def answer(self, *_: object) -> None:
        """The handler: Python runs it in the main thread."""
        self._answered = max(self._answered + 1, self._seen)
        raise KeyboardInterrupt

    def watch(self, told: int) -> None:
        while number := os.read(told, 1):
            if number[0] != signal.SIGINT:
                continue
            self._seen += 1
            if self._seen - self._answered > 1:
                os._exit(INTERRUPTED)
            time.sleep(PATIENCE)
            if self._seen > self._answered:
                print(STOPPING, file=sys.stderr)


@contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    ours = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts, (told, tell) = _Interrupts(), os.pipe()
    os.set_blocking(tell, False)
    wakeup = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupts.answer)
    watch = threading.Thread(target=interrupts.watch, args=(told,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(wakeup)
        os.close(tell)  # ends the thread
        watch.join()
        os.close(told)
