"""Work in several steps, done by a thread; each step's result may be waited for.

MLX ties an array that is not evaluated yet to its thread, so a step hands over evaluated ones. And
it may abort a process whose thread is ending at the exit, so there is one thread, which never ends.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")
Jobs = SimpleQueue[Callable[[], None]]


@cache
def _jobs() -> Jobs:
    """What the thread is to do; it is started when this is first asked for."""
    jobs: Jobs = SimpleQueue()
    Thread(target=_work, args=(jobs,), daemon=True).start()
    return jobs


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_jobs.cache_clear)  # a child has no threads


def _work(jobs: Jobs) -> None:
    while True:
        jobs.get()()


class Steps(Generic[Result]):
    """Runs an iterator in the thread; `wait(n)` gives what it yielded n-th, or raises its error."""

    def __init__(self, work: Iterator[Result]) -> None:
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._changed = Condition()
        _jobs().put(lambda: self._run(work))

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
