"""`python -m tests.fuzz [--total 100000] [--only CLASS] [--first N] [--seed N]`.

Every class has a process of its own, which may crash or hang without ending the others; counts per
class go to stdout. Exit code 1 when there was a fault.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from . import CLASSES
from .harness import Tally, run

MEMORY = 24 << 30  # bytes of address space
SILENCE = 120  # seconds for one input, in all


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--total", type=int, default=100_000, help="inputs of all classes together")
    parser.add_argument("--only", choices=CLASSES, help="this class alone")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return _child(args)
    names = [args.only] if args.only else list(CLASSES)
    weight = sum(CLASSES[name][1] for name in names)
    tallies = []
    for name in names:
        count = max(1, args.total * CLASSES[name][1] // weight)
        tallies.append(_class(name, range(args.first, args.first + count), args.seed))
        print(tallies[-1].line(), flush=True)
        for number, what in tallies[-1].faults[:20]:
            print(f"    {name} {number}: {what}", flush=True)
    faults = sum(len(tally.faults) for tally in tallies)
    print(f"{sum(tally.tried for tally in tallies):,} inputs, {faults} faults")
    return 1 if faults else 0


def _class(name: str, numbers: range, seed: int) -> Tally:
    """All inputs of a class; a process that ends before them is a fault, and the next goes on."""
    whole = Tally(name)
    start = numbers.start
    while start < numbers.stop:
        command = [sys.executable, "-m", "tests.fuzz", "--only", name, "--first", str(start)]
        command += ["--seed", str(seed), "--child", str(numbers.stop)]
        part, last, reason = _watch(command, start)
        whole.right += part.right
        whole.refused += part.refused
        whole.faults += part.faults
        if reason:
            whole.faults.append((last, reason))
        start = last + 1
        if len(whole.faults) > 50:
            break
    return whole


def _watch(command: list[str], start: int) -> tuple[Tally, int, str]:
    """Tally of a child, the number of its last input, and why it ended early, if it did."""
    tally, last = Tally(""), start
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        import select

        while True:
            ready, _, _ = select.select([child.stdout], [], [], SILENCE)
            line = child.stdout.readline() if ready else ""
            if not ready:
                child.kill()
                return tally, last, f"hung for {SILENCE} s"
            if not line:
                break
            state = json.loads(line)
            last = state["number"]
            tally = Tally("", state["right"], state["refused"], [tuple(f) for f in state["faults"]])
            if state.get("done"):
                return tally, last, ""
    return tally, last, f"the process ended with {child.returncode}"


def _child(args: argparse.Namespace) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    prepare = CLASSES[args.only][0]
    total = Tally(args.only)

    def say(number: int, done: bool = False) -> None:
        state = {"number": number, "right": total.right, "refused": total.refused,
                 "faults": total.faults, "done": done}  # fmt: skip
        print(json.dumps(state), flush=True)

    run(prepare, range(args.first, args.child), args.seed, say, total)
    say(args.child - 1, done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
