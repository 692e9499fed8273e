"""Work in several steps, done in a thread; each step's result may be waited for.

MLX ties an array that is not evaluated yet to its thread, so a step hands over evaluated ones.
"""

from collections.abc import Iterator
from threading import Condition, Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Steps(Generic[Result]):
    """Runs an iterator in a thread; `wait(n)` gives what it yielded n-th, or raises its error."""

    def __init__(self, work: Iterator[Result]) -> None:
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._changed = Condition()
        Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Iterator[Result]) -> None:
        try:
            for result in work:
                with self._changed:
                    self._results.append(result)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  (raised again in the thread that waits)
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def wait(self, step: int) -> Result:
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._results) > step)
            if len(self._results) > step:
                return self._results[step]
            assert self._error is not None
            raise self._error
