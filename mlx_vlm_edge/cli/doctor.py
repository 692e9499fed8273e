"""`mlx-vlm-edge doctor`: what is here, what is missing; a test of the machine and of a model."""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import whole_file
from ..errors import UsageError
from ..paths import expand
from ..wording import gigabytes

if TYPE_CHECKING:
    from ..doctor.selftest import Outcome

HELP = "Check this machine and the installation; test the kernels, or a published model."
WRONG = 1  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--selftest | --model NAME] [options]"
    what = parser.add_argument_group("what").add_mutually_exclusive_group()
    what.add_argument(
        "--selftest", action="store_true",
        help="compute with every form of every kernel and with the demo model, and compare",
    )  # fmt: skip
    what.add_argument(
        "-m", "--model", metavar="NAME",
        help="pull a published model (alias or Hub id; asks first), check it, ask it three "
        "questions, and write a report to paste",
    )  # fmt: skip
    parser.add_argument(
        "--report", metavar="FILE", help="where --model's report goes (default: by its name, here)"
    )
    parser.add_argument("--yes", "-y", action="store_true", help="pull without asking")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # or a GPU's float32 is less than that
    if args.report and not args.model:
        raise UsageError("--report is of --model: name a model")
    if args.model:
        return _model(args)
    if args.selftest:
        from ..doctor.selftest import selftest

        return _tell_outcomes(selftest(), as_json=args.json)
    return _checks(as_json=args.json)


def _machine() -> dict[str, Any]:
    from mlx_vlm_edge_bench.bench.machine import record

    return record()


def _checks(*, as_json: bool) -> int:
    from ..doctor import checks

    told = checks.checks()
    try:
        machine = _machine()
    except (ImportError, RuntimeError):  # MLX is not there, which a check says
        machine = {}
    wrong = any(check.state == "wrong" for check in told)
    if as_json:
        listed = [asdict(check) for check in told]
        print(json.dumps({"machine": machine, "checks": listed, "ok": not wrong}))
    else:
        print("\n".join(checks.lines(_summary(machine), told)))
    return WRONG if wrong else 0


def _summary(machine: dict[str, Any]) -> str:
    from mlx_vlm_edge_bench.bench.machine import summary

    return summary(machine) if machine else "a machine on which MLX does not start"


def _tell_outcomes(outcomes: Iterable["Outcome"], *, as_json: bool) -> int:
    """Each as it comes; JSON at the end."""
    signs = {True: "ok", False: "WRONG", None: "-"}
    told: list[Outcome] = []
    for outcome in outcomes:
        told.append(outcome)
        if not as_json:
            print(f"{signs[outcome.right]:6}{outcome.name}: {outcome.said}", flush=True)
    wrong = [outcome.name for outcome in told if outcome.right is False]
    if as_json:
        print(json.dumps({"tests": [asdict(item) for item in told], "ok": not wrong}))
    else:
        print(f"{len(told)} comparisons, {len(wrong)} wrong", file=sys.stderr)
    return WRONG if wrong else 0


def _model(args: argparse.Namespace) -> int:
    from ..doctor.published import report

    out = _report_file(args)
    told = report(args.model, _pulled(args), _machine())
    text = json.dumps(told, ensure_ascii=False, indent=1)
    whole_file.write(out, text + "\n")
    if args.json:
        print(text)
    else:
        _summarise(told)
        print(f"the whole report, without paths of yours: {out}", file=sys.stderr)
    return WRONG if told["problems"] else 0


def _report_file(args: argparse.Namespace) -> Path:
    """Where the report goes, before anything is fetched for it."""
    name = args.report or f"report-{args.model.strip('/').replace('/', '-')}.json"
    out = expand(name)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out}: cannot be written; --report names another file")
    return out


def _pulled(args: argparse.Namespace) -> Path:
    """The model's folder; its size is told, and asked about, before it is fetched."""
    from ..hub.cache import usable_snapshot
    from ..hub.models import DEMO, expanded, locate, repo_id
    from .models import confirmed, fetched

    if args.model == DEMO or expanded(args.model).is_dir():
        return locate(args.model)
    repo = repo_id(args.model)
    if folder := usable_snapshot(repo):
        return folder
    if not args.yes:
        from ..hub.download import describe

        remote = describe(repo)
        size = gigabytes(remote.nbytes)
        if not confirmed(f"pull {repo} ({size}, licence {remote.licence})? [y/N] "):
            raise UsageError(f"{repo} is not on this machine and was not pulled")
    return fetched(args.model)


def _summarise(told: dict[str, Any]) -> None:
    for problem in told["problems"]:
        print(f"WRONG {problem}")
    if "answers" not in told:
        return
    print(f"{told['model']}: {told['weights']} weights, all of them used")
    for row in told["answers"]:
        print(f"{row['picture']}  {row['question']}\n  {row['answer'].strip()}")
        print(
            f"  first token after {row['ttft_e2e'] * 1000:.0f} ms (picture and prompt in), "
            f"{row['generation_tps']:.1f} tokens/s, peak {row['peak_memory']:.2f} GB"
        )
