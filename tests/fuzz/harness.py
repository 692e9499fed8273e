"""A class of inputs, tried one after the other: each is refused in a line or gives a right result.

An input is made and tried by `attempt(rng)`; its generator is seeded by class and number, so that
one input can be tried again alone. A fault is any other error, an error that is no printable line,
too much CPU time or memory, a program that is started, or a file written outside its folder.
"""

import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_vlm_edge.errors import UsageError

SECONDS = 20.0  # of CPU time for one input
GIGABYTES = 2.0  # that the peak of the process may rise by with one input
Attempt = Callable[[random.Random], None]
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
            "subprocess.Popen", "pty.spawn")  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """A class of inputs. prepare: makes its sound ones in an empty folder, once."""

    name: str
    prepare: Callable[[Path], Attempt]


@dataclass
class Tally:
    """How many inputs were right, refused, or faults: (number of the input, what happened)."""

    name: str
    right: int = 0
    refused: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.right + self.refused + len(self.faults)

    def line(self) -> str:
        faults = f", {len(self.faults)} FAULTS" if self.faults else ""
        counts = f"{self.tried:7,} tried: {self.right:7,} right, {self.refused:7,} refused"
        return f"{self.name:24} {counts}{faults}"


class Late(BaseException):
    """The CPU time of an input is over."""


class Forbidden(BaseException):
    """A program was started or a file written outside."""


_watched: dict[str, Any] = {}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched.get("folder"):
        return
    if event in PROGRAMS:
        _watched["broken"] = f"{event} {arguments[:1]!a}"
        raise Forbidden(_watched["broken"])
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        name = str(arguments[0])
        if not name.startswith(_watched["folder"]) and not name.startswith("/dev/"):
            _watched["broken"] = f"wrote {name!a}"
            raise Forbidden(_watched["broken"])


@contextmanager
def _watching(folder: Path) -> Iterator[None]:
    if not _watched.get("installed"):
        sys.addaudithook(_hook)
    _watched.update(folder=str(folder), broken="", installed=True)
    previous = signal.signal(signal.SIGPROF, _late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        _watched["folder"] = ""


def _late(*_: Any) -> None:
    _watched["broken"] = f"took more than {SECONDS:g} s"
    raise Late(_watched["broken"])


def run(
    inputs: Inputs,
    numbers: range,
    seed: int = 0,
    said: Callable[[int], Any] = int,
    tally: Tally | None = None,
) -> Tally:
    """Try the inputs of these numbers. said: called with the number of each before it is tried."""
    tally = tally or Tally(inputs.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        attempt = inputs.prepare(folder)
        with _watching(folder):
            for number in numbers:
                said(number)
                rng = random.Random(f"{seed}:{inputs.name}:{number}")
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                outcome = _outcome(attempt, rng)
                rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                if rise > GIGABYTES * 1e6 * (1000 if sys.platform == "darwin" else 1):
                    outcome = f"took {rise / 1e6:.1f} GB"
                if _watched["broken"]:
                    outcome, _watched["broken"] = _watched["broken"], ""
                tally.right += outcome == "right"
                tally.refused += outcome == "refused"
                if outcome not in ("right", "refused"):
                    tally.faults.append((number, outcome))
    return tally


def _outcome(attempt: Attempt, rng: random.Random) -> str:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        attempt(rng)
    except UsageError as error:
        line = str(error)
        good = line and len(line) < 2000 and line.isprintable()
        return "refused" if good else f"an error that is no line: {line[:200]!a}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  (whatever it is, it is a fault)
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        return f"{type(error).__name__} at {where}: {str(error)[:150]!a}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "right"
