"""Work in several steps, done by a thread; each step's result may be waited for.

MLX ties an array that is not evaluated yet to its thread, so a step hands over evaluated ones. And
it may abort a process whose thread is ending or computing at the exit, so there is one thread,
which never ends, and the exit waits for what it is at: long work asks `stop_if_exiting` often.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Condition, Event, Lock, Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")
Jobs = Queue[Callable[[], None]]
INTERRUPTED = 130  # exit code


class _Worker:
    """The one thread, and what it is to do; started when it is first asked for."""

    def __init__(self) -> None:
        self._starting, self.exiting = Lock(), Event()
        self._jobs: Jobs | None = None

    def put(self, job: Callable[[], None]) -> None:
        with self._starting:
            if self._jobs is None:
                self._jobs = Queue()
                thread = Thread(target=_work, args=(self._jobs,), daemon=True)
                thread.start()
                atexit.register(self._settle, self._jobs, thread)
            self._jobs.put(job)

    def _settle(self, jobs: Jobs, thread: Thread) -> None:
        """At the exit: wait for what is under way; a second Ctrl-C does not."""
        if not jobs.unfinished_tasks or not thread.is_alive():  # a forked child has no such thread
            return
        self.exiting.set()
        try:
            jobs.join()
            time.sleep(0.01)  # until it waits for the next job, where it may stay
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)


_worker = _Worker()


def _forget_worker() -> None:
    global _worker
    _worker = _Worker()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_worker)  # a child has no threads


def _work(jobs: Jobs) -> None:
    while True:
        jobs.get()()
        jobs.task_done()


class Exiting(BaseException):
    """Nobody waits for this work any more: the process ends."""


def stop_if_exiting() -> None:
    """For long work to ask between its parts. Raises Exiting when the process is ending."""
    if _worker.exiting.is_set():
        raise Exiting


class Steps(Generic[Result]):
    """Runs an iterator in the thread; `wait(n)` gives what it yielded n-th, or raises its error."""

    def __init__(self, work: Iterator[Result]) -> None:
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._changed = Condition()
        _worker.put(lambda: self._run(work))

    def _run(self, work: Iterator[Result]) -> None:
        try:
            for result in work:
                with self._changed:
                    self._results.append(result)
                    self._changed.notify_all()
                stop_if_exiting()
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


class Background(Generic[Result]):
    """Calls a function in the thread; `wait()` gives what it returns, or raises its error."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._steps = Steps(_once(function))

    def wait(self) -> Result:
        return self._steps.wait(0)


def _once(function: Callable[[], Result]) -> Iterator[Result]:
    yield function()
