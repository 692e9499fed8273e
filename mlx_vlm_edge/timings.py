"""Named steps of a piece of work, and a timer that runs them.

What is done is a generator: it names each step as that ends and hands over what came of it, so that
whoever runs it may time the steps, or look at them, or neither.
"""

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

Clock = Callable[[], float]  # seconds from any origin
T = TypeVar("T")
Steps = Generator[tuple[str, Any], None, T]


def watched(steps: Steps[T], look: Callable[[str, Any], None]) -> T:
    """Run steps, looking at each one's name and outcome as it ends, and give what they return."""
    while True:
        try:
            name, outcome = next(steps)
        except StopIteration as end:
            returned: T = end.value
            return returned
        look(name, outcome)


def result(steps: Steps[T]) -> T:
    """Run steps, whatever their names, and give what they return."""
    return watched(steps, lambda name, outcome: None)


class Watch(Protocol):
    """Is told how long a prompt is, and of every step as it ends; see generation/progress.py."""

    def expect(self, pictures: Sequence[Any], start: int, length: int, step_size: int) -> None: ...

    def __call__(self, name: str, outcome: Any) -> None: ...


class Timer:
    """Runs steps; with `measured`, `seconds` has each one's time, summed by name.

    A step's arrays are then evaluated at its end, which costs a synchronisation each.
    """

    def __init__(
        self,
        measured: bool = False,
        clock: Clock = time.perf_counter,
        progress: Watch | None = None,
    ) -> None:
        self.measured = measured
        self.clock = clock
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._last = clock()

    def restart(self) -> float:
        """Have the next step begin now; when that is."""
        self._last = self.clock()
        return self._last

    def copy(self) -> "Timer":
        """The same times so far, to go on by themselves."""
        other = Timer(self.measured, self.clock, self.progress)
        other.seconds, other._last = dict(self.seconds), self._last
        return other

    def run(self, steps: Steps[T]) -> T:
        """What the steps return at their end."""
        return watched(steps, self.mark)

    def mark(self, name: str, outcome: Any = None) -> None:
        """End a step that came out with an array, or with what is no concern of the device's."""
        if self.progress is not None:
            self.progress(name, outcome)
        if not self.measured:
            return
        import mlx.core as mx

        if isinstance(outcome, mx.array):
            mx.eval(outcome)
        now = self.clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
