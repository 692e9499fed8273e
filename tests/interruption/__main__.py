"""`python -m tests.interruption COMMAND... [--all]`: kills commands at their operations on files.

This process imports and never computes; each command runs in a child forked from it, which MLX
bears once. Out comes a JSON object a command: points, kills, and what went wrong.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .commands import COMMANDS, Command
from .injector import KILLED, Injector

SAMPLE = 4  # even points of a command in the usual tests, beside those of moves
_MOVES = ("rename", "replace", "swap")


class FailedError(Exception):
    """A child did not end as it should; what it said."""


def in_child(work: Callable[[], Any], may_die: bool = False) -> Any:
    """What `work` returns, computed in a forked child; None where it was killed."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                answer.write(json.dumps(work()).encode())
                answer.flush()
                sys.stdout.flush()
                os._exit(0)
            except BaseException:  # noqa: BLE001  (the parent is told)
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == KILLED and may_die:
            return None
        said.seek(0)
        if code != 0:
            raise FailedError(f"ended with {code}: {said.read().decode(errors='replace')[-1500:]}")
        answer.seek(0)
        return json.loads(answer.read())


class Host:
    """One command, its folder as it was before, and the names that are there after it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.command: Command = COMMANDS[name]
        self.before, self.root = folder / "before", folder / "root"
        self.root.mkdir(parents=True)
        for module in self.command.loads:
            import_module(module)
        in_child(lambda: self._doubled(self.command.prepare))
        self.root.rename(self.before)
        self._restore()
        told = in_child(lambda: self._run(0, False))
        self.points, self.names = told["count"], told["names"]
        self.problems = [f"not on the disk at the end: {what}" for what in told["unsynced"]]
        self.after = self._tree()

    def kill(self, point: int, power: bool) -> bool:
        """Kill at one operation, and see what is there and whether the command finishes the work;
        False where the command was through before."""
        self._restore()
        where = f"{point} ({self.names[point - 1]}){' with loss of power' if power else ''}"
        try:
            killed = in_child(lambda: self._run(point, power), may_die=True) is None
            state, done, finished = in_child(self._again)
        except FailedError as failed:
            self.problems.append(f"{where}: {failed}")
            return True
        if state not in self.command.states:
            self.problems.append(f"{where}: then there is {state}")
        if (done, finished) != (0, "new"):
            self.problems.append(f"{where}: run again, {done} and {finished}")
        if odd := sorted(self._tree() ^ self.after):
            self.problems.append(f"{where}: run again, these differ: {odd}")
        return killed

    def _doubled(self, work: Callable[[Path], Any]) -> Any:
        self.command.double(self.root)
        return work(self.root) and None

    def _run(self, point: int, power: bool) -> dict[str, Any]:
        self.command.double(self.root)
        injector = Injector(self.root, point, power)
        injector.arm()
        code = self.command.run(self.root)
        lost = [*injector.unsynced(), *sorted(injector.unsettled)] if self.command.durable else []
        if code or self.command.state(self.root) != "new":
            raise FailedError(f"{code}, {self.command.state(self.root)}")
        return {"count": injector.count, "names": injector.names, "unsynced": lost}

    def _again(self) -> tuple[str, int, str]:
        self.command.double(self.root)
        state = self.command.state(self.root)
        try:
            code = self.command.run(self.root)
        except SystemExit as left:
            code = int(left.code or 0)
        if state == "new" and code == 2 and self.command.states[0] == "none":
            code = 0  # "is not empty": the work was done
        return state, code, self.command.state(self.root)

    def _restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root, symlinks=True)

    def _tree(self) -> set[str]:
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")}


def interrupt(name: str, every: bool) -> dict[str, Any]:
    """Kill a command at all its operations in both ways, or at a sample of them in one each."""
    with tempfile.TemporaryDirectory() as folder:
        host = Host(name, Path(folder))
        if every:
            kills = [(point, power) for point in range(1, host.points + 1) for power in (0, 1)]
        else:
            step = max(1, host.points / SAMPLE)
            chosen = {round((index + 0.5) * step) or 1 for index in range(SAMPLE)}
            moves = [index + 2 for index, name in enumerate(host.names) if name.startswith(_MOVES)]
            chosen |= {*moves[:3], host.points}
            points = sorted(point for point in chosen if point <= host.points)
            kills = [(point, index % 2) for index, point in enumerate(points)]
        killed = sum(host.kill(point, bool(power)) for point, power in kills)
    return {"command": name, "points": host.points, "kills": killed, "problems": host.problems}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--all", action="store_true", help="at every operation, in both ways")
    args = parser.parse_args()
    total = wrong = 0
    for name in args.commands or COMMANDS:
        told = interrupt(name, args.all)
        print(json.dumps(told), flush=True)
        total, wrong = total + told["kills"], wrong + len(told["problems"])
    print(f"{total} kills, {wrong} problems", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
