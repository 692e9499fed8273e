"""`mlx-vlm-edge bench`: time to first token and the rest, measured; `--claims`: the paper's."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..paths import expand
from .flags import BACKENDS, DEFAULT_MODEL, default_model

if TYPE_CHECKING:
    from mlx_vlm_edge_bench.bench.cases import BenchOptions
    from mlx_vlm_edge_bench.claims.read import Claim

HELP = (
    "Measure time to first token, stage by stage, with the spread of the runs. ttft: vision "
    "encoder + prefill, from staged runs (the FastVLM paper's definition, but with the prompt's "
    "text in the prefill; --claims leaves it out as well). ttft_e2e: image bytes and prompt in, "
    "first token out. ttft_cold: a fresh process, from its start to its first text."
)
MAX_TOKENS, RUNS = 32, 5
CASES_ONLY = (
    "model", "random_weights", "resolution", "bits", "dtype", "image", "prompt_tokens", "no_cold",
    "energy", "vision_backend", "max_tokens", "visual_tokens", "token_method", "plot",
)  # fmt: skip
NOT_OF_CURVES = ("no_cold", "energy", "max_tokens", "prompt_tokens")
NARROW, WIDE = 40, 120
IN_PARTS = (
    "Measured in parts, as the paper does: encoder and prefill by themselves, one tile for "
    "several, the first and the last chunk for a long prefill. --no-in-parts runs all of it."
)
WHOLE = "Encoder and prefill are measured by themselves, as in the paper, and their times added."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--model NAME ...] [--random-weights] [options]"
    what = parser.add_argument_group("what to measure (every model x resolution x bits is a case)")
    what.add_argument(
        "-m", "--model", nargs="+", action="extend", default=[], metavar="NAME",
        help=f"aliases, Hub ids or folders (default: as in generate; {DEFAULT_MODEL} for random "
        "weights)",
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
    what.add_argument("--vision-backend", metavar="NAME", help=f"{BACKENDS} (default: mlx)")
    what.add_argument(
        "--image", metavar="FILE", help="picture to ask about (default: a drawn one, 1024 x 1024)"
    )
    what.add_argument(
        "--prompt-tokens", type=int, metavar="N",
        help="text tokens of the prompt, exactly; visual ones come on top (default: a question's)",
    )  # fmt: skip
    what.add_argument(
        "--max-tokens", type=int, metavar="N",
        help="tokens to decode, exactly: an end token does not end a run (default: "
        f"{MAX_TOKENS})",
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
    curve = parser.add_argument_group("fewer visual tokens")
    curve.add_argument(
        "--visual-tokens", nargs="+", default=[], metavar="N|RATIO",
        help="TTFT, memory and agreement with all tokens at these numbers, beside random choice, "
        "pooling and lower resolutions",
    )  # fmt: skip
    curve.add_argument(
        "--token-method", nargs="+", default=[], metavar="NAME",
        help="how tokens are chosen, as in generate (default: divprune)",
    )  # fmt: skip
    curve.add_argument("--plot", metavar="FILE", help="a page (HTML) with the curve's plots")
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
        "--json", nargs="?", const="-", metavar="FILE",
        help="print the whole record, every run, machine and versions, and the tables on standard "
        "error; with a FILE write it there",
    )  # fmt: skip


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

    def under(self, label: str) -> Callable[[str], None]:
        """The same, every text after a label."""
        return lambda text: self(f"{label}: {text}")

    def clear(self) -> None:
        """Before something is printed on stdout."""
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    from mlx_vlm_edge_bench.bench.saved import STDOUT, writable

    _refuse_mixtures(args)
    tables = redirect_stdout(sys.stderr) if args.json == STDOUT else nullcontext()
    run_asked = _claims if args.claims is not None else _curve if args.visual_tokens else _cases
    with writable(args.json) as save, tables:
        return run_asked(args, save)


def _refuse_mixtures(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that would be ignored."""
    if args.claims is None:
        if args.in_parts is not None:
            raise UsageError("--in-parts is for --claims")
        _refuse_for_curve(args)
        return
    for name in CASES_ONLY:
        value = getattr(args, name)
        if value is not None and value is not False and value != []:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is not for --claims: each claim says what it runs")


def _refuse_for_curve(args: argparse.Namespace) -> None:
    if not args.visual_tokens:
        if args.token_method or args.plot:
            raise UsageError("--token-method and --plot are for --visual-tokens: say how many")
        return
    if len(args.model) > 1 or len(args.bits) > 1:
        raise UsageError("--visual-tokens is of one model at one precision")
    for name in NOT_OF_CURVES:
        if getattr(args, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is not for --visual-tokens, which has no such figure")


def _curve(args: argparse.Namespace, save: Callable[..., None]) -> int:
    from mlx_vlm_edge_bench.bench import cases, machine
    from mlx_vlm_edge_bench.bench.saved import replacing
    from mlx_vlm_edge_bench.curve import run as curve
    from mlx_vlm_edge_bench.curve import shown
    from mlx_vlm_edge_bench.random.question import QUESTION

    from ..picture.token_budget import METHODS, parse_tokens

    asked, width, progress = _options(args), _width(), Progress()
    budgets = tuple(parse_tokens(text) for text in args.visual_tokens)
    methods = tuple(args.token_method) or METHODS[:1]
    options = curve.CurveOptions(
        budgets, methods, tuple(args.resolution), args.runs, asked.image, QUESTION
    )
    curve.ways(options)  # or a clear line
    cases.check(asked)
    (choice,) = asked.choices
    record: dict[str, Any] = {
        "kind": "curve", "machine": machine.record(), "model": choice.model,
        "weights": choice.weights, "image": asked.image_name, "points": [],
    }  # fmt: skip
    code = 0
    with replacing("--plot", args.plot) as put_page:
        _say(_heading(record["machine"]), width)
        try:
            with _saving(record, "points", save, progress):
                record["points"].extend(curve.run(choice, options, progress))
        except KeyboardInterrupt:
            code = 130
        if record["points"]:
            print(f"\n{shown.table(record['points'], choice.random, width)}")
            put_page(shown.page(record).encode() if args.plot else b"")
    return code


def _cases(args: argparse.Namespace, save: Callable[..., None]) -> int:
    from mlx_vlm_edge_bench.bench import cases, energy, last, machine, table

    options, width, progress = _options(args), _width(), Progress()
    cases.check(options)
    record: dict[str, Any] = {"kind": "bench", "machine": machine.record(), "cases": []}
    _say(_heading(record["machine"]), width)
    if options.energy and (why := energy.unavailable()):
        _say([why], width)
    code = 0
    try:
        with _saving(record, "cases", save, progress):
            for case in cases.run(options, progress):
                progress.clear()
                record["cases"].append(case)
                if options.usual:
                    last.remember(case, options.dtype)
                print(f"\n{table.case(case, width)}", flush=True)
    except KeyboardInterrupt:
        code = 130
        print(f"stopped: {len(record['cases'])} of {options.count} cases measured", file=sys.stderr)
    if len(record["cases"]) > 1:
        print(f"\n{table.summary(record['cases'], width)}")
    if record["cases"]:
        print(f"\n{table.notes(width)}")
    return code


@contextmanager
def _saving(
    record: dict[str, Any], results: str, save: Callable[..., None], progress: Progress
) -> Iterator[None]:
    """Whatever ends the work, what was measured until then is saved; what is not all says so."""
    record["interrupted"] = True
    try:
        yield
        del record["interrupted"]
    finally:
        progress.clear()
        if record[results]:
            save(record)


def _options(args: argparse.Namespace) -> "BenchOptions":
    from mlx_vlm_edge_bench.bench.cases import BenchOptions
    from mlx_vlm_edge_bench.bench.picture import NAME, default_picture

    return BenchOptions(
        models=tuple(args.model) or (DEFAULT_MODEL if args.random_weights else default_model(),),
        resolutions=tuple(args.resolution) or (None,),
        bits=tuple(args.bits) or (None,),
        random=args.random_weights,
        dtype=args.dtype,
        prompt_tokens=args.prompt_tokens,
        max_tokens=MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        runs=args.runs,
        image=_read(args.image) if args.image else default_picture(),
        image_name=args.image or NAME,
        cold=not args.no_cold,
        energy=args.energy,
        vision_backend=args.vision_backend or "mlx",
    )


def _read(name: str) -> bytes:
    try:
        return expand(name).read_bytes()
    except OSError as error:
        raise UsageError(f"--image {name}: cannot be read ({error.strerror})") from None


def _width() -> int:
    return max(NARROW, min(WIDE, shutil.get_terminal_size().columns))


def _heading(record: dict[str, Any]) -> list[str]:
    from mlx_vlm_edge_bench.bench import machine

    warning = machine.busy(machine.load_average(), record["cores"])
    return [machine.summary(record), *([warning] if warning else [])]


def _say(lines: Sequence[str], width: int) -> None:
    import textwrap

    for line in lines:
        print(textwrap.fill(line, width, break_on_hyphens=False), flush=True)


def _claims(args: argparse.Namespace, save: Callable[..., None]) -> int:
    from mlx_vlm_edge_bench.claims import read as claims
    from mlx_vlm_edge_bench.claims import table as claim_table

    width, known = _width(), claims.read()
    if args.claims == ["list"]:
        print(claim_table.listed(known, width))
        return 0
    wanted = claims.chosen(known, args.claims)
    if args.runs < 1:
        raise UsageError(f"--runs must be 1 or more, not {args.runs}")
    return _run_claims(args, wanted, save, width)


def _run_claims(
    args: argparse.Namespace, wanted: Sequence["Claim"], save: Callable[..., None], width: int
) -> int:
    from mlx_vlm_edge_bench.bench import machine
    from mlx_vlm_edge_bench.claims import run as claim_run
    from mlx_vlm_edge_bench.claims import table as claim_table
    from mlx_vlm_edge_bench.claims.timed import PartTimer

    progress, code = Progress(), 0
    record: dict[str, Any] = {"kind": "claims", "machine": machine.record(), "claims": []}
    record["load_average"] = [machine.load_average()]
    setting = claim_run.Setting(record["machine"], args.runs, bool(args.claims))
    in_parts = args.in_parts if args.in_parts is not None else not setting.on_gpu
    how = IN_PARTS if in_parts else WHOLE
    timed = any(claim.timed for claim in wanted)
    _say([*_heading(record["machine"]), *([how] if timed else [])], width)
    timer = PartTimer(in_parts)
    try:
        with _saving(record, "claims", save, progress):
            for index, claim in enumerate(wanted, 1):
                label = f"{index} of {len(wanted)}, {claim.id}"
                done = claim_run.run(claim, setting, timer, progress.under(label))
                progress.clear()
                record["claims"].append(done)
                record["load_average"][1:] = [machine.load_average()]
                print(f"\n{claim_table.claim(done, width)}", flush=True)
    except KeyboardInterrupt:
        code = 130
        print(f"stopped: {len(record['claims'])} of {len(wanted)} claims run", file=sys.stderr)
    if record["claims"]:
        print(f"\n{claim_table.summary(record['claims'], width)}")
    return code
