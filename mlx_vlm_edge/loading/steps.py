"""Work in several steps, done by a thread; each step's result may be waited for.

MLX ties an array that is not evaluated yet to its thread, so a step hands over evaluated ones. And
it may abort a process whose thread is ending or computing at the exit, so there is one thread,
which never ends, and the exit waits for the step that it is at.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from queue import Queue
from threading import Condition, Event, Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")
Jobs = Queue[Callable[[], None]]
INTERRUPTED = 130  # exit code
_leaving = Event()  # no more steps are begun


@cache
def _jobs() -> Jobs:
    """What the thread is to do; it is started when this is first asked for."""
    jobs: Jobs = Queue()
    thread = Thread(target=_work, args=(jobs,), daemon=True)
    thread.start()
    atexit.register(_settle, jobs, thread)
    return jobs


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_jobs.cache_clear)  # a child has no threads


def _work(jobs: Jobs) -> None:
    while True:
        jobs.get()()
        jobs.task_done()


def _settle(jobs: Jobs, thread: Thread) -> None:
    """At the exit: wait for the step that is under way; a second Ctrl-C does not."""
    if not jobs.unfinished_tasks or not thread.is_alive():  # a forked child has no such thread
        return
    _leaving.set()
    try:
        jobs.join()
        time.sleep(0.01)  # until it waits for the next job, where it may stay
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


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
                if _leaving.is_set():
                    return
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
