"""A process's own time to its first token, part by part, from the interpreter's start."""

import time
from typing import Any

from .. import STARTED
from ..timings import Clock, Timer, Watch

# The steps of an answer (timings.py) -> the part they count as.
PARTS = {
    "image decode": "picture",
    "preprocess": "picture",
    "tokenise": "prompt",
    "vision": "vision",
    "connector": "vision",
    "reduce": "vision",
    "prefill": "prefill",
    "first sample": "first token",
}
WAITED_FOR = ("vision", "prefill")  # parts of their own only where each is waited for


class ColdTimer(Timer):
    """The timer of a process's first answer; `parts` has seconds by part, in their order.

    "start" is the interpreter's, in processor time; what follows is by the clock, one part from
    the last one's end to its own, so that together they are the time to the first token. What is
    begun and not waited for counts where it is: unless `measured`, vision and prefill are in
    "first token".
    """

    def __init__(
        self,
        measured: bool = False,
        clock: Clock = time.perf_counter,
        progress: Watch | None = None,
        started: tuple[float, float] = STARTED,
    ) -> None:
        super().__init__(measured, clock, progress)
        before, began = started
        self.parts = {"start": before}
        self._began = self._at = began

    def part(self, name: str) -> None:
        """End a part, or a piece of one."""
        now = self.clock()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._at
        self._at = now

    def mark(self, name: str, outcome: Any = None) -> None:
        super().mark(name, outcome)
        part = PARTS.get(name, name)
        if self.measured or part not in WAITED_FOR:
            self.part(part)

    @property
    def ttft(self) -> float:
        """Seconds from the interpreter's start to the end of the last part."""
        return self.parts["start"] + self._at - self._began
