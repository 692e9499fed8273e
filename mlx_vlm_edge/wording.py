"""How names, sizes and the errors of others are put into a line for the user."""

from collections.abc import Iterable


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
