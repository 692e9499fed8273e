"""Parts of an array that have nothing to do with each other, on every core."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")


@cache
def threads() -> int:
    """As many as a BLAS takes."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    return int(setting) if setting.isdigit() and int(setting) else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads(), "interpreter")


def each(function: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call it of every item, in any order; numpy lets other threads work while it computes."""
    count = min(threads(), len(items))
    if count < 2:
        for item in items:
            function(item)
        return

    def some(first: int) -> None:
        for item in items[first::count]:
            function(item)

    # numpy's errstate is the context's
    done = [_pool().submit(copy_context().run, some, first) for first in range(count)]
    for future in done:
        future.result()
