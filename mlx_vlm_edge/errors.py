"""The one exception meant for users: a single line that names the cause and the remedy."""

from collections.abc import Iterable
from typing import Any

from .wording import first_line

LONGEST = 1000  # characters of a line; what a file says may be longer


class UsageError(Exception):
    """A mistake the user can mend. The command line prints it and exits with code 2.

    It is one printable line, whatever of files and servers is quoted in it: a control character
    would reach the terminal. Python callers may catch it as well: nothing was written when it is
    raised.
    """

    def __init__(self, line: str) -> None:
        if not line.isprintable():
            line = "".join(x if x.isprintable() else " " if x.isspace() else "?" for x in line)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)


class UnreachableError(UsageError):
    """The Hub cannot be reached, or must not be: what is here may do."""


class Refusing:
    """The outer net of a reader: whatever it raises becomes one line, source, fault and remedy.

    Also what a Rust package panics with, which is no Exception.
    """

    def __init__(self, source: object, fault: str, remedy: str) -> None:
        self._source, self._fault, self._remedy = source, fault, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        through = (UsageError, KeyboardInterrupt, SystemExit, GeneratorExit)
        if error is None or isinstance(error, through):
            return
        reason = first_line(error)[:80]
        raise UsageError(f"{self._source}: {self._fault} ({reason}): {self._remedy}") from None


def check_keywords(function: str, keywords: Iterable[str], options: Any) -> None:
    """Raises TypeError, as Python does, for a keyword that is no field of a class of options."""
    known = set(options.__dataclass_fields__)
    if unknown := set(keywords) - known:
        raise TypeError(
            f"{function}: unknown option {min(unknown)!r}; known are {', '.join(sorted(known))}"
        )
