"""`mlx-vlm-edge batch`: the same questions about many pictures, answers as JSON lines."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..paths import expand
from ..system_files import of_the_system
from . import streams
from .flags import (
    add_model_group,
    add_picture_arguments,
    add_sampling_arguments,
    default_model,
    fit_into_memory,
    load_options,
    load_whole,
    prefix_cache,
    sampling_options,
    within_budget,
)

if TYPE_CHECKING:
    from ..generation.batch import Batch, Progress
    from ..generation.engine import Engine
    from ..loading.load import LoadOptions

HELP = "Ask the same questions about many pictures; answers go to a file of JSON lines."
EVERY = 5.0  # seconds between lines of progress where standard error is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} PATTERN|DIR|- ... --prompt TEXT -o FILE [options]"
    group = parser.add_argument_group("work")
    group.add_argument(
        "pictures", nargs="+", metavar="PATTERN|DIR|-",
        help="files, patterns such as 'photos/*.jpg', folders (with what is below them), "
        "addresses; - reads names from standard input, one a line",
    )  # fmt: skip
    group.add_argument(
        "-p", "--prompt", action="append", required=True, metavar="TEXT",
        help="a question; several are asked about each picture",
    )  # fmt: skip
    group.add_argument(
        "-o", "--output", required=True, metavar="FILE",
        help="JSON lines; a run that was stopped goes on where it was",
    )  # fmt: skip
    group.add_argument(
        "--retry-errors", action="store_true", help="try again what an earlier run failed at"
    )
    group.add_argument("--system", "--system-prompt", metavar="TEXT", help="the system prompt")
    group.add_argument(
        "--rows", type=int, default=8, metavar="N", help="pictures answered together"
    )
    add_model_group(parser)
    add_picture_arguments(parser.add_argument_group("pictures"))
    add_sampling_arguments(parser.add_argument_group("generation"))


def run(args: argparse.Namespace) -> int:
    from ..generation.batch import Batch, Output, Run, content_of, share
    from ..generation.loop import Options

    if args.rows < 1:
        raise UsageError(f"--rows must be 1 or more, not {args.rows}")
    if not all(text.strip() for text in args.prompt):
        raise UsageError("--prompt is empty: ask something")
    options, pictures = Options(**sampling_options(args)), _pictures(args.pictures)
    rank, size = _group()
    pictures = share(pictures, rank, size, content_of) if size > 1 else pictures
    name = args.model or default_model()
    loading = within_budget(args, name, load_options(args))
    _check_tokens(name, loading, pictures)
    asked = Run(name, args.prompt, args.system, options, loading)
    output = Output(_output(args.output, rank, size), asked, args.retry_errors)
    try:
        engine = _engine(args, name, loading)
        try:
            return _answer(Batch(engine, asked, output, pictures))
        finally:
            engine.close()
    finally:
        output.close()


def _check_tokens(name: str, loading: "LoadOptions", pictures: list[str]) -> None:
    """Raises UsageError for a number of visual tokens that none of the pictures has. What cannot
    be told before it is fetched or decoded may have as many."""
    if not isinstance(loading.visual_tokens, int) or any("://" in name for name in pictures):
        return
    from ..loading.fitting import check_any_picture

    check_any_picture(name, loading, filter(None, map(_size, pictures)))


def _size(picture: str) -> tuple[int, int] | None:
    from ..picture.image import check_header

    try:
        return check_header(picture)
    except UsageError:  # told as the failure of this picture
        return None


def _engine(args: argparse.Namespace, name: str, loading: "LoadOptions") -> "Engine":
    from ..generation.engine import Engine

    rows = fit_into_memory(args, name, loading, rows=args.rows)
    model, processor = load_whole(name, loading)
    waiting, remembered = 2 * rows + 8, prefix_cache(args)
    return Engine(model, processor, rows=rows, waiting=waiting, prefix_cache=remembered)


def _group() -> tuple[int, int]:
    """This process's rank and how many there are, as `mlx.launch` starts them."""
    if not any(name in os.environ for name in ("MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK")):
        return 0, 1
    import mlx.core as mx

    group = mx.distributed.init()
    return group.rank(), group.size()


def _output(name: str, rank: int, size: int) -> Path:
    """out.jsonl, or of several processes out-0-of-2.jsonl and so on."""
    path = expand(name)
    return path if size == 1 else path.with_name(f"{path.stem}-{rank}-of-{size}{path.suffix}")


def _pictures(asked: list[str]) -> list[str]:
    """The pictures' names, each once. Raises UsageError where there are none."""
    names: dict[str, None] = {}
    for item in asked:
        names.update(dict.fromkeys(_named(item)))
    if not names:
        raise UsageError(f"no pictures in {', '.join(asked)}")
    return list(names)


def _named(item: str) -> list[str]:
    import glob

    if item == "-":
        if streams.input_closed():
            raise UsageError("standard input is closed: there are no names to read")
        return [os.fsdecode(line) for line in streams.piped().splitlines() if line.strip()]
    if "://" in item:
        return [item]
    path = expand(item)
    if path.is_dir():
        from ..picture.image import SUFFIXES

        below = sorted(path.rglob("*"))
        named = [file for file in below if file.suffix.lower() in SUFFIXES]
        return [str(file) for file in named if not of_the_system(file.name)]
    if path.is_file():
        return [str(path)]
    matching = sorted(glob.glob(str(path), recursive=True))
    if not matching:
        raise UsageError(f"{item}: no such file or folder, and no file is named like it")
    return [name for name in matching if Path(name).is_file()]


def _answer(batch: "Batch") -> int:
    """Work through a batch; 0 when every line of the file is an answer, 1 when some are errors."""
    shown, before = _Shown(), batch.output
    if before.done:
        told = f", {len(before.failed)} of them errors (--retry-errors)" if before.failed else ""
        _note(f"{len(before.done)} are there already{told}, {batch.progress.total} are left")
    code = 0
    try:
        for progress in batch:
            if progress.error is not None:
                shown.say(f"failed: {progress.error}")
            shown.update(progress)
    except KeyboardInterrupt:
        code = 130
    progress = batch.progress
    shown.end(f"{progress.answered} answered, {progress.failed} failed")
    if code:
        _note("stopped; the same command goes on from here")
    return code or int(progress.failed > 0 or bool(before.failed))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Shown:
    """Progress on standard error: one line that changes, or lines now and then."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()

    def update(self, progress: "Progress") -> None:
        now = time.monotonic()
        if now - self._last < (0.2 if self._terminal else EVERY):
            return
        self._last = now
        rate = progress.done / (now - self._started)
        left = (progress.total - progress.done) / rate
        line = (
            f"{progress.done}/{progress.total}, {rate:.2f} a second, "
            f"{left / 60:.0f} min left, {progress.failed} failed"
        )
        if self._terminal:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            _note(line)

    def say(self, line: str) -> None:
        """A line of its own, above the one that changes."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr)
        _note(line)

    def end(self, line: str) -> None:
        self.say(f"{line} in {time.monotonic() - self._started:.1f} s")
