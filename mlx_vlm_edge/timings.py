"""Stage timings: wall time between marks, with the arrays of a stage evaluated at its end.

Evaluating costs a synchronisation per stage, so it happens only when timings are asked for.
"""

import time
from typing import Any


class Stages:
    """`mark(name, *arrays)` ends a stage; `seconds` has each one's time, summed by name."""

    def __init__(self, measured: bool = False) -> None:
        self.measured = measured
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str, *arrays: Any) -> None:
        if not self.measured:
            return
        if arrays:
            import mlx.core as mx

            mx.eval(*arrays)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
