"""Stage timings: wall time between marks, with the arrays of a stage evaluated at its end.

Evaluating costs a synchronisation per stage, so it happens only when timings are asked for.
"""

import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[], float]  # seconds from any origin


class Stages:
    """`mark(name, *arrays)` ends a stage; `seconds` has each one's time, summed by name."""

    def __init__(self, measured: bool = False, clock: Clock = time.perf_counter) -> None:
        self.measured = measured
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._last = clock()

    def copy(self) -> "Stages":
        """The same times so far, to go on by themselves."""
        other = Stages(self.measured, self.clock)
        other.seconds, other._last = dict(self.seconds), self._last
        return other

    def mark(self, name: str, *arrays: Any) -> None:
        if not self.measured:
            return
        if arrays:
            import mlx.core as mx

            mx.eval(*arrays)
        now = self.clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
