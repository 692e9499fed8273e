#!/usr/bin/env python3
"""Generate many times in one process and print what it held: memory, threads, files, wrong answers.

    python -m tests.tools.long_run --generations 2000

In turn: with and without a prefix cache, other models loaded and dropped, 8 threads, asyncio. The
first part warms up; memory is compared from there on. The threads are those of one pool: MLX keeps
a native thread, and its memory, for every thread that ever computed (mlx 0.32, `clear_streams` or
not), so a program that starts new ones for ever grows.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import os
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vlm_edge import PrefixCache, generate, load

WARM = 0.3  # of all generations
THREADS = 8
TURNS = 24
OTHERS = ({"bits": 8}, {"bits": 4}, {"dtype": "bfloat16"}, {"resolution": 64})
QUESTIONS = ("What is this?", "Name the colour of it.", "How many are there?", "Read the text.")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that are in memory; the most there ever were where Linux isn't.

    What was freed and is still held for reuse goes back first: it is what goes up and down.
    """
    gc.collect()
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * PAGE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def picture(index: int) -> np.ndarray:
    """One of 24 plain pictures, no two of a size."""
    n = index % 24
    return np.full((40 + 7 * n, 90 - 2 * n, 3), 10 * n, np.uint8)


class Run:
    """One model that is asked, and what each question gave the first time."""

    def __init__(self) -> None:
        self.model, self.processor = load("demo")
        self.cache, self.pool = PrefixCache(4 << 20), ThreadPoolExecutor(THREADS)
        self.first: dict[tuple[int, int], str] = {}
        self.wrong = 0
        together = threading.Barrier(THREADS)
        list(self.pool.map(lambda _: (together.wait(), mx.eval(mx.ones(2) + 1)), range(THREADS)))

    def ask(self, index: int) -> None:
        """One generation, which must say what the same question got before."""
        key = index % 24, index % len(QUESTIONS)
        cache = self.cache if index % 2 else None
        said = generate(
            self.model, self.processor, QUESTIONS[key[1]], images=[picture(index)],
            max_tokens=6, prefix_cache=cache,
        )  # fmt: skip
        self.wrong += self.first.setdefault(key, said) != said

    def one_by_one(self, numbers: range) -> None:
        for index in numbers:
            self.ask(index)

    def threads(self, numbers: range) -> None:
        list(self.pool.map(self.ask, numbers))

    def asyncio(self, numbers: range) -> None:
        async def all_of_them() -> None:
            places = asyncio.Semaphore(THREADS)

            async def one(index: int) -> None:
                async with places:
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self.pool, self.ask, index)

            await asyncio.gather(*map(one, numbers))

        asyncio.run(all_of_them())


def other_model(options: dict[str, object]) -> None:
    """Load another model, ask it, and drop it."""
    model, processor = load("demo", **options)
    generate(model, processor, QUESTIONS[0], images=[picture(0)], max_tokens=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", type=int, default=2000)
    total = parser.parse_args().generations
    run, done, series = Run(), 0, []
    warm, held = 0, {}
    ways = (run.one_by_one, run.threads, run.one_by_one, run.asyncio)
    step = max(1, total // (TURNS if total >= 400 else TURNS // 3))
    for turn, start in enumerate(range(0, total, step)):
        numbers = range(start, min(start + step, total))
        ways[turn % len(ways)](numbers)
        other_model(OTHERS[turn % len(OTHERS)])
        done += len(numbers)
        series.append(resident())
        if not warm and turn >= len(ways) - 1 and done >= WARM * total:
            warm, held = len(series), holds()
    told = {"generations": done, "wrong": run.wrong, "warm": held, "after": holds()}
    # What a process has in memory goes up and down: a leak shows in what it never falls below.
    floors = [min(part, default=0) for part in (series[warm : -len(ways)], series[-len(ways) :])]
    growth = floors[1] / floors[0] - 1 if floors[0] else None  # of a short run
    print(json.dumps({**told, "growth": growth, "resident": series}))
    return 0


def holds() -> dict[str, int]:
    """What the process has now: bytes of MLX's arrays, open files, threads."""
    gc.collect()
    native = Path("/proc/self/task")
    threads = len(list(native.iterdir())) if native.is_dir() else threading.active_count()
    return {"mlx": mx.get_active_memory(), "files": open_files(), "threads": threads}


if __name__ == "__main__":
    sys.exit(main())
