"""`mlx-vlm-edge estimate`: what a model would take on a chip, by arithmetic on its shapes."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..wording import gigabytes
from .flags import add_token_arguments, sides, tokens_asked

if TYPE_CHECKING:
    from mlx_vlm_edge_bench.estimate.calibration import Row
    from mlx_vlm_edge_bench.estimate.chips import Chip
    from mlx_vlm_edge_bench.estimate.outlook import Outlook

HELP = "Estimate operations, memory, time to first token and decode rate of a model on a chip."
DEFAULT_MODEL = "fastvlm-0.5b"
_TABLES = {
    "paper": "FastVLM's paper",
    "mlx_lm": "mlx-lm",
    "llama_cpp": "llama.cpp",
    "m5_over_m4": "M5 over M4",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--model NAME ...] [--chip NAME ...] [options]"
    what = parser.add_argument_group("what")
    what.add_argument(
        "-m", "--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME",
        help=f"aliases, downloaded Hub ids or folders (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    what.add_argument(
        "--chip", nargs="+", default=[], metavar="NAME",
        help="m1-max, m1-max-24 (by GPU cores), a17-pro, ... (default: this Mac's)",
    )  # fmt: skip
    what.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 5, 6, 8, 16), metavar="N",
        help="of the language model's weights, 2 to 8 in groups of 64, or 16 (default: as the "
        "config has it)",
    )  # fmt: skip
    what.add_argument("--resolution", type=int, metavar="PX", help="as `generate` takes it")
    add_token_arguments(what)
    what.add_argument(
        "--image-size", default="1024x1024", metavar="WxH", help="the picture's own pixels"
    )
    what.add_argument(
        "--prompt-tokens", type=int, metavar="N",
        help="text tokens of the prompt, exactly; visual ones come on top (default: those of a "
        "short question in a stand-in's vocabulary)",
    )  # fmt: skip
    what.add_argument(
        "--context", type=int, metavar="N",
        help="positions of the KV cache (default: the prompt and 256 more)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--chips", action="store_true", help="list the chips and their sources")
    output.add_argument(
        "--calibration", action="store_true",
        help="print the error of every row that the estimates were held against",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.chips:
        _print_chips(as_json=args.json)
    elif args.calibration:
        _print_calibration(as_json=args.json)
    else:
        _estimate(args)
    return 0


def _estimate(args: argparse.Namespace) -> None:
    from mlx_vlm_edge_bench.estimate import chips as known
    from mlx_vlm_edge_bench.estimate.costs import plan_of, prompt_cost
    from mlx_vlm_edge_bench.estimate.outlook import LABEL, outlook

    from ..loading.cost import config_of
    from ..picture.token_budget import token_budget

    budget = token_budget(tokens_asked(args), args.token_method)
    image = sides("--image-size", args.image_size, "WIDTHxHEIGHT")
    configs = {name: config_of(name) for name in args.model}
    chips = [known.find(name) for name in args.chip] or [known.own()]
    outlooks: list[Outlook] = []
    for name, config in configs.items():
        plan = plan_of(config, args.bits, resolution=args.resolution, budget=budget)
        cost = prompt_cost(plan, image, args.prompt_tokens)
        outlooks += [outlook(name, plan, cost, chip, args.context) for chip in chips]
    if args.json:
        whole = [item.as_json() for item in outlooks]
        print(json.dumps(whole[0] if len(whole) == 1 else whole))
    elif len(outlooks) == 1:
        words = "" if args.prompt_tokens else " (as a stand-in counts: --prompt-tokens N)"
        print(f"{LABEL}: {_describe(outlooks[0], image, words)}")
    else:
        print(f"{LABEL}; the picture is {image[0]} x {image[1]} pixels\n{_compare(outlooks)}")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells, the first one a heading, as aligned lines: columns of numbers to the right.

    table([["x", "n"], ["a", "1"], ["bcd", "20"]]) -> "x     n\\na     1\\nbcd  20"
    """
    columns = [_aligned(column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    numbers = all(cell[:1] in "+-0123456789" for cell in column[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in column]


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _describe(outlook: "Outlook", image: tuple[int, int], words: str) -> str:
    """words: what is to be said of the number of text tokens."""
    chip, step = outlook.chip, outlook.step
    tiles = f" in {outlook.tiles} tiles" if outlook.tiles > 1 else ""
    rows = [["stage", "GFLOP", "MB", "ms", "bound by"]]
    for stage in (*outlook.stages, step):
        name = "decode, a token" if stage is step else stage.name
        cells = [name, f"{stage.flops / 1e9:,.1f}", f"{stage.nbytes / 1e6:,.0f}"]
        rows.append([*cells, _ms(stage.ms), stage.bound])
    total = ["first token"]
    total += [f"{sum(s.flops for s in outlook.stages) / 1e9:,.1f}"]
    total += [f"{sum(s.nbytes for s in outlook.stages) / 1e6:,.0f}", _ms(outlook.ttft), ""]
    rows.insert(len(rows) - 1, total)
    lines = [
        f"{outlook.model} at {_bits(outlook)} bits on {chip.name}",
        f"a picture of {image[0]} x {image[1]} pixels{tiles}: {outlook.visual_tokens:,} visual and "
        f"{outlook.text_tokens:,} text tokens{words}\n",
        table(rows),
        f"\n{outlook.rate:,.1f} tokens/s after the first one",
        *_engine_line(outlook),
        *_memory_lines(outlook),
        f"chip: {_ceilings(chip)}",
    ]
    if chip.unconfirmed:
        lines.append(f"UNCONFIRMED figures of this chip: {', '.join(chip.unconfirmed)}")
    lines.append(
        "not in it: reading and resizing the picture, sampling, loading. All of it is on the GPU, "
        "where no\npublished figure of a vision tower was found to hold the first row against.\n"
        "how far such estimates were off: --calibration; the chips' sources: --chips"
    )
    return "\n".join(lines)


def _bits(outlook: "Outlook") -> str:
    """ "4", or "4 and 8" of a model whose layers differ."""
    return " and ".join(map(str, outlook.bits))


def _ceilings(chip: "Chip") -> str:
    matrix = f", {chip.matrix:.1f} in its matrix units" if chip.matrix else ""
    return f"{chip.fp32:.1f} TFLOPS{matrix}, {chip.bandwidth:g} GB/s"


def _engine_line(outlook: "Outlook") -> list[str]:
    if outlook.engine_ms is None:
        return []
    return [
        "with the vision tower on the Neural Engine, as the paper has it: "
        f"{_ms(outlook.engine_ms)} ms, first token {_ms(outlook.ttft_engine or 0)} ms"
    ]


def _memory_lines(outlook: "Outlook") -> list[str]:
    needed = outlook.memory
    shares = (f"{needed['total'] / size / 1e9:.0%} of {size} GB" for size in outlook.chip.memory)
    return [
        f"memory: weights {gigabytes(needed['weights'])}, cache of {outlook.context:,} positions "
        f"{gigabytes(needed['cache'])}, activations about {gigabytes(needed['activations'])}",
        f"        {gigabytes(needed['total'])} in all: {', '.join(shares)}",
    ]


def _compare(outlook: Sequence["Outlook"]) -> str:
    """One line per model and chip."""
    head = ["model", "chip", "bits", "tokens", "vision", "prefill", "first token", "tokens/s"]
    rows = [[*head, "memory", ""]]
    for item in outlook:
        stages = {stage.name: _ms(stage.ms) for stage in item.stages}
        total, largest = item.memory["total"], max(item.chip.memory)
        notes = ["unconfirmed"] * bool(item.chip.unconfirmed)
        notes += [f"too large for {largest} GB"] * (total > largest * 1e9)
        rows.append(
            [
                item.model, item.chip.id, _bits(item),
                f"{item.visual_tokens + item.text_tokens:,}",
                f"{stages.get('vision', '-')} ms", f"{stages['prefill']} ms",
                f"{_ms(item.ttft)} ms", f"{item.rate:,.1f}", gigabytes(total), ", ".join(notes),
            ]
        )  # fmt: skip
    return table(rows)


def _print_chips(*, as_json: bool) -> None:
    from mlx_vlm_edge_bench.estimate import chips

    known = chips.known()
    if as_json:
        listed = {chip.id: chips.figures(chip.id) for chip in known}
        print(json.dumps({"tags": chips.tags(), "chips": listed, "sources": chips.sources()}))
        return
    rows = [["chip", "GPU cores", "TFLOPS", "matrix", "GB/s", "memory, GB", ""]]
    for chip in known:
        cores = "/".join(map(str, chips.figures(chip.id)["gpu_cores"]["value"]))
        doubts = f"unconfirmed: {', '.join(chip.unconfirmed)}" if chip.unconfirmed else ""
        matrix = f"{chip.matrix:.1f}" if chip.matrix else "-"
        sizes = "/".join(map(str, chip.memory))
        rows.append(
            [chip.id, cores, f"{chip.fp32:.2f}", matrix, f"{chip.bandwidth:g}", sizes, doubts]
        )
    print(f"{table(rows)}\n\nTFLOPS and GB/s of the largest variant; m1-max-24 names another.\n")
    print("every figure, its tag and its sources (--json has them for a program):")
    for chip in known:
        print(f"  {chip.id}: {_sourced(chips.figures(chip.id))}")
    print("tags: " + "; ".join(f"{tag} {text}" for tag, text in chips.tags().items()))
    print("sources:")
    for key, text in chips.sources().items():
        print(f"  {key}: {text}")


def _sourced(entry: Any) -> str:
    """The figures of a chip with tag and sources: "gpu_cores 24/32 (S; D4167, ADV), ..."."""
    parts = []
    for key, figure in entry.items():
        for one in figure if isinstance(figure, list) else [figure]:
            if isinstance(one, dict):
                value = one["value"]
                text = "/".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
                origin = "; ".join([one["tag"], ", ".join(one["sources"])])
                parts.append(f"{key} {text} ({origin})")
    return ", ".join(parts)


def _print_calibration(*, as_json: bool) -> None:
    from mlx_vlm_edge_bench.estimate import calibration
    from mlx_vlm_edge_bench.estimate.outlook import LABEL

    rows = calibration.rows()
    if as_json:
        from dataclasses import asdict

        print(json.dumps([{**asdict(row), "error": row.error} for row in rows]))
        return
    print(f"estimates against what others measured; nothing here was measured by us ({LABEL})")
    for name, title in _TABLES.items():
        own = [row for row in rows if row.table == name]
        print(f"\n{title}: {calibration.source(name)}\nrates: {calibration.rates(name)}")
        print(_errors_table(own))
        for figure in dict.fromkeys(row.figure for row in own):
            off = calibration.errors([row for row in own if row.figure == figure])
            of_all = f"; worst of all rows {_error(off.worst_of_all)}"
            print(
                f"{figure}: median error {off.median:.0%}, worst {_error(off.worst)} over the "
                f"{off.counted} rows without fitted figures, repetitions and misprints"
                f"{of_all if off.worst_of_all is not off.worst else ''}"
            )


def _error(row: "Row") -> str:
    return f"{row.error:+.0%} ({row.name})"


def _errors_table(rows: Sequence["Row"]) -> str:
    listed = [["", "", "measured", "estimated", "", "error", ""]]
    for row in rows:
        note = "fitted" if row.fitted else row.note
        values = [_ms(row.measured) if row.unit != "times" else f"{row.measured:.2f}"]
        values += [_ms(row.estimated) if row.unit != "times" else f"{row.estimated:.2f}", row.unit]
        listed.append([row.name, row.figure, *values, f"{row.error:+.0%}", note])
    return table(listed)
