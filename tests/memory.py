"""What a piece of a test takes of MLX's memory, whatever other tests' arrays still hold."""

import gc
from collections.abc import Callable

import mlx.core as mx


class Peak:
    """bytes: the most at once since this was made, beyond what was there already."""

    def __init__(self) -> None:
        gc.collect()
        mx.synchronize()
        mx.reset_peak_memory()
        self._before = mx.get_active_memory()

    @property
    def bytes(self) -> int:
        return mx.get_peak_memory() - self._before


def least_peak(run: Callable[[], mx.array], tries: int = 3) -> int:
    """Bytes at once that `run` needs. On a busy machine MLX asks for the next arrays before it
    has let go of the last ones, so the least of several tries counts."""
    taken = []
    for _ in range(tries):
        mx.clear_cache()
        peak = Peak()
        mx.eval(run())
        taken.append(peak.bytes)
    return min(taken)
