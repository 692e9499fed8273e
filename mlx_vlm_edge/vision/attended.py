"""What a vision transformer's attention says of its patches, for whoever asks while it runs.

Nothing is computed for it unless somebody does: a tower that has attention of every patch tells
`told`, and `listening` has what was told meanwhile, by the same thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import mlx.core as mx

EARLY = 0.375  # of the layers: the one that HiPrune finds objects by, 9 of CLIP's 24


@dataclass(frozen=True)
class Attended:
    """One call of a tower on B pictures of N patches.

    early, late: float32[B, N], what patches receive in an early and in the last layer, the mean
    over heads and queries. of_class: what they receive from the class token in the last layer, the
    sum over heads; None where there is none. keys: float32[B, N, d], of the last layer, the mean
    over heads. hidden: [B, 1 + N, C] or [B, N, C], the tower's output, class token first.
    """

    early: mx.array
    late: mx.array
    of_class: mx.array | None
    keys: mx.array
    hidden: mx.array


_listeners: ContextVar[list[Attended] | None] = ContextVar("listeners", default=None)


@contextmanager
def listening() -> Iterator[list[Attended]]:
    """Have towers tell, call after call."""
    calls: list[Attended] = []
    token = _listeners.set(calls)
    try:
        yield calls
    finally:
        _listeners.reset(token)


def told() -> list[Attended] | None:
    """Where to put what is seen; None when nobody listens."""
    return _listeners.get()


def scores(q: mx.array, k: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Queries and keys [B, heads, N, d] -> attention float32[B, heads, N, N], row by query."""
    x = (q.astype(mx.float32) * scale) @ k.astype(mx.float32).swapaxes(-1, -2)
    if mask is not None:
        x = mx.where(mask, x, -mx.inf)
    return mx.softmax(x, axis=-1)
