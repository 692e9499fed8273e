"""The one net under what reads packages and bundles: a malformed file is a line, no traceback."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import first_line

# What arbitrary content does to code that expects its own: keys that are missing, values of another
# type, sizes that cannot be, nesting without end.
_FAULTS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError,
    ValueError, struct.error, SafetensorError,
)  # fmt: skip


@contextmanager
def reading(what: object, verdict: str = "is damaged") -> Iterator[None]:
    """Raises UsageError, `what` and its verdict, for whatever its content does to the block."""
    try:
        yield
    except _FAULTS as error:
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        reason = f"{kind}{first_line(error)}"
        raise UsageError(f"{what} {verdict} ({reason}); export it again") from error
