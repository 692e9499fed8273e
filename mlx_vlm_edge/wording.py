"""How names, sizes and the errors of others are put into a line for the user."""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

# What moves a terminal's cursor, changes its state or turns text around.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_PROGRESS = re.compile(r"(\r|\x1b\[[KA])")  # of a line that changes: to its beginning, wiped, up


def say(line: str) -> None:
    """Tell on stderr of what went wrong beside an answer, and harms none."""
    with suppress(OSError, ValueError):  # nobody reads there any more
        print(line, file=sys.stderr, flush=True)


@cache
def say_once(note: str) -> None:
    """A note on stderr, the first time that it is to be said."""
    print(note, file=sys.stderr)


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few, and how many more there are: some("abcde") -> "a, b, c and 2 more"."""
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def gigabytes(nbytes: float) -> str:
    """1_520_000_000 -> "1.52 GB", 12_000_000 -> "12 MB"; 1e9 bytes are a gigabyte."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} kB"


def first_line(error: BaseException) -> str:
    """What a library's error says, without what it says below; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quoted(value: object, limit: int = 60) -> str:
    """A value that is not what it should be: a text or a number as it is, shortened; of anything
    that may be deep, its type."""
    if isinstance(value, str):
        return repr(value[:limit])
    plain = value is None or isinstance(value, bool | int | float)
    return f"{value!r:.{limit}}" if plain else f"a {type(value).__name__}"


def printable(text: str, *, lines: bool = True, progress: bool = False) -> str:
    """Text as a terminal may show it, controls spelt out: names and answers are not ours.

    lines: whether it may have line ends. progress: whether a line may be written over.
    """
    if progress:
        parts = _PROGRESS.split(text)
        return "".join(part if _PROGRESS.fullmatch(part) else printable(part) for part in parts)
    shown = _CONTROLS.sub(lambda match: _escaped(match[0]), text)
    return shown if lines else shown.replace("\n", "\\n")


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
