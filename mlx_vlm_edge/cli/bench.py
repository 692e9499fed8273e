"""`mlx-vlm-edge bench`: time to first token and the rest, measured; `--claims`: the paper's."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .generate import DEFAULT_MODEL, default_model

if TYPE_CHECKING:
    from ..bench.cases import Options

HELP = (
    "Measure time to first token, stage by stage, with the spread of the runs. "
    "ttft: vision encoder + prefill (the FastVLM paper's definition). ttft_e2e: image bytes and "
    "prompt in, first token out. ttft_cold: a fresh process, from its start to its first text."
)
MAX_TOKENS, RUNS = 32, 5
NARROW, WIDE = 40, 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--model NAME ...] [--random-weights] [options]"
    what = parser.add_argument_group("what to measure (every model x resolution x bits is a case)")
    what.add_argument(
        "--model", nargs="+", action="extend", default=[], metavar="NAME",
        help=f"aliases, Hub ids or folders (default: $MLX_VLM_EDGE_MODEL, else {DEFAULT_MODEL} "
        "if it is here, else the bundled demo)",
    )  # fmt: skip
    what.add_argument(
        "--random-weights", action="store_true",
        help="the model at its full size with random weights: no download, the same latency",
    )  # fmt: skip
    what.add_argument(
        "--resolution", nargs="+", type=int, default=[], metavar="PX",
        help="pixels, as in generate (default: the checkpoint's)",
    )  # fmt: skip
    what.add_argument(
        "--bits", nargs="+", type=int, choices=(4, 8), default=[],
        help="quantise the language model while loading (default: as the checkpoint is)",
    )  # fmt: skip
    what.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="of weights and activations (default: the checkpoint's, or bfloat16 for random ones, "
        "on a GPU; float32 on a CPU)",
    )  # fmt: skip
    what.add_argument(
        "--image", metavar="FILE", help="picture to ask about (default: a drawn one, 1024 x 1024)"
    )
    what.add_argument(
        "--prompt-tokens", type=int, metavar="N",
        help="text tokens of the prompt, exactly; visual ones come on top (default: a question's)",
    )  # fmt: skip
    what.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="N",
        help="tokens to decode, exactly: an end token does not end a run",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument(
        "--runs", type=int, default=RUNS, metavar="N",
        help="staged and plain runs, in turn, after a warm-up of each",
    )  # fmt: skip
    how.add_argument("--no-cold", action="store_true", help="leave the fresh processes out")
    how.add_argument(
        "--energy", action="store_true", help="energy by macOS's powermetrics, which needs root"
    )
    claims = parser.add_argument_group("the paper's claims")
    claims.add_argument(
        "--claims", nargs="*", metavar="ID",
        help="run every claim that can be run on this device, or those named; `--claims list` "
        "shows them",
    )  # fmt: skip
    claims.add_argument(
        "--in-parts", action=argparse.BooleanOptionalAction,
        help="measure one tile and some chunks of a long prefill and sum them up "
        "(default: on the CPU back end only)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="write the whole record: every run, machine and versions"
    )


class Progress:
    """What is being done, on one line of a terminal's stderr, or a line each elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        if sys.stderr is None:
            return
        line = f"[{time.monotonic() - self._began:5.0f} s] {text}"
        width = shutil.get_terminal_size().columns - 1
        shown = f"\r\033[K{line[:width]}" if self._live else f"{line}\n"
        print(shown, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Before something is printed on stdout."""
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    from ..bench.saved import writable

    with writable(args.json) as save:
        return _claims(args, save) if args.claims is not None else _cases(args, save)


def _cases(args: argparse.Namespace, save: Callable[..., None]) -> int:
    from ..bench import cases, energy, machine, table

    options, width, progress = _options(args), _width(), Progress()
    cases.check(options)
    record: dict[str, Any] = {"kind": "bench", "machine": machine.record(), "cases": []}
    print("\n".join(_wrapped(machine.summary(record["machine"]), width)), flush=True)
    if options.energy and (why := energy.unavailable()):
        print(why)
    code = 0
    try:
        for case in cases.run(options, progress):
            progress.clear()
            record["cases"].append(case)
            print(f"\n{table.case(case, width)}", flush=True)
    except KeyboardInterrupt:
        progress.clear()
        code, record["interrupted"] = 130, True
        print(f"stopped: {len(record['cases'])} of {options.count} cases measured", file=sys.stderr)
    if len(record["cases"]) > 1:
        print(f"\n{table.summary(record['cases'], width)}")
    if record["cases"]:
        print(f"\n{table.notes(width)}")
        save(record)
    return code


def _options(args: argparse.Namespace) -> "Options":
    from ..bench.cases import Options
    from ..bench.picture import NAME, default_picture

    return Options(
        models=tuple(args.model) or (default_model(),),
        resolutions=tuple(args.resolution) or (None,),
        bits=tuple(args.bits) or (None,),
        random=args.random_weights,
        dtype=args.dtype,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        runs=args.runs,
        image=_read(args.image) if args.image else default_picture(),
        image_name=args.image or NAME,
        cold=not args.no_cold,
        energy=args.energy,
    )


def _read(name: str) -> bytes:
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"--image {name}: cannot be read ({error.strerror})") from None


def _width() -> int:
    return max(NARROW, min(WIDE, shutil.get_terminal_size().columns))


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def _claims(args: argparse.Namespace, save: Callable[..., None]) -> int:
    raise UsageError("not yet")
