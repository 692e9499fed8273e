"""A fresh process from its start to the first text of an answer.

`python -m mlx_vlm_edge_bench.bench.cold SPEC` is that process: it loads the model and answers,
prints one line at the first token and one with its times and memory at the end. `cold_run` starts
it and holds the clock.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_edge.errors import UsageError

if TYPE_CHECKING:
    from mlx_vlm_edge.timings import Clock

    from .figures import ColdRun
    from .loaded import Choice

TOKENS = 2
FIRST = "first token"


def spec(choice: "Choice", resolution: int | None, text: str, image: Path) -> str:
    """What the process is to do, as its one argument."""
    return json.dumps(
        {**asdict(choice), "resolution": resolution, "text": text, "image": str(image)}
    )


def command(spec: str) -> list[str]:
    return [sys.executable, "-m", __name__, spec]


def cold_run(command: list[str], clock: "Clock" = time.perf_counter) -> "ColdRun":
    """Run the process once. Raises UsageError with its last words when it fails."""
    from .figures import ColdRun

    with tempfile.TemporaryFile("w+") as errors:  # a pipe could fill up while stdout is read
        started = clock()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            assert child.stdout is not None
            first = child.stdout.readline()
            ttft = clock() - started
            rest = child.stdout.read()
        errors.seek(0)
        said = errors.read().strip()
    if child.returncode or not rest.strip():
        last = (said or f"exit code {child.returncode}").splitlines()[-1]
        raise UsageError(f"the fresh process for ttft_cold failed: {last}; --no-cold leaves it out")
    if first.strip() != FIRST:
        raise UsageError(f"the fresh process for ttft_cold said {first.strip()!r}")
    told = json.loads(rest)
    inside = told["inside"]
    start = {"start": ttft - sum(inside.values())}
    return ColdRun(ttft, start | inside, told["rss"], told["peak_memory"])


def answer(spec: dict[str, Any]) -> None:
    """What the fresh process does."""
    began = time.perf_counter()
    from mlx_vlm_edge.generation.loop import stream_generate

    from .loaded import Choice, LoadedModel

    imported = time.perf_counter()
    choice = Choice(**{field.name: spec[field.name] for field in fields(Choice)})
    model, processor = LoadedModel(choice, ahead=True).at(spec["resolution"])
    processor.eos_ids = frozenset()
    loaded = time.perf_counter()
    pieces = stream_generate(
        model, processor, spec["text"], [Path(spec["image"]).read_bytes()], max_tokens=TOKENS
    )
    next(pieces)
    told = time.perf_counter()
    print(FIRST, flush=True)
    last = list(pieces)[-1]
    inside = {"import": imported - began, "load": loaded - imported, "answer": told - loaded}
    report = {"inside": inside, "rss": rss(), "peak_memory": last.peak_memory}
    print(json.dumps(report), flush=True)


def rss() -> float:
    """The high-water mark of this process's resident memory, in GB (1e9 bytes)."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    try:
        answer(json.loads(sys.argv[1]))
    except UsageError as error:
        sys.exit(f"{error}")
