"""Records -> text for a terminal of any width: a block per case, a summary of several."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import UNACCOUNTED, Figure, doubts, ratio

Record = Mapping[str, Any]
SIDE_BY_SIDE = 112  # columns from which a figure's meaning stands beside it
FULL = 64  # columns that a figure with its warm-up takes
MEANINGS = {
    "ttft": "vision encoder + prefill of the whole prompt",
    "ttft_e2e": "image bytes and prompt in, first token out",
    "ttft_cold": "a fresh process: its start to its first text",
}
NOTES = (
    "the paper's ttft has the prefill of the visual tokens only, without the prompt's text",
    "spread: (max - min) / min of the runs; warm-up: the first run's, counted nowhere else",
)
CHECKPOINT = "checkpoint"  # what a record says of weights that were read
STAGES = "stage: "
COLD = "cold: "
COLD_NAMES = {
    "start": "interpreter",
    "import": "import",
    "load": "load",
    "answer": "first answer",
}
RATES = {
    "decode_tps": "decode",
    "prefill_tps": "prompt, prefill",
    "prompt_tps": "prompt, e2e",
}
MEMORY = {"peak_memory": "MLX", "rss": "fresh process"}


def case(record: Record, width: int = 80) -> str:
    """One case: what it is, its TTFTs, stages, rates and memory."""
    figures = {name: _figure(told) for name, told in record["figures"].items()}
    lines = [*textwrap.wrap(title(record), width), *textwrap.wrap(counts(record), width), ""]
    lines.append(_row("", ("median", "min", "spread", "warm-up"), "", width))
    for name in MEANINGS:
        if name in figures:
            lines.append(_time(name, figures[name], width, MEANINGS[name]))
        if name == "ttft_cold":
            lines += _group(figures, COLD, _cold_names(record), width)
    lines += _stages(record, figures, width)
    lines += _listed("tokens/s", RATES, figures, "{:,.1f}", width)
    lines += _listed("peak memory, GB", MEMORY, figures, "{:,.3f}", width)
    lines += _warnings(figures, width)
    if power := record.get("energy"):
        lines.append(
            f"energy: {power['joules_per_answer']:.2f} J per answer, {power['watts']:.1f} W "
            f"(powermetrics, mean of {power['answers']} answers)"
        )
    lines += textwrap.wrap(record.get("energy_note", ""), width)
    return "\n".join(line.rstrip() for line in lines)


def title(record: Record) -> str:
    side = f"{record['resolution']} px" if record["resolution"] else "its own resolution"
    bits = f"{record['bits']} bits, " if record["bits"] else ""
    backend = record.get("vision_backend", "mlx")
    tower = "" if backend == "mlx" else f", vision by {backend}"
    return f"{record['model']}, {side}, {bits}{record['dtype']}, {record['weights']}{tower}"


def counts(record: Record) -> str:
    visual = record["visual_tokens"]
    runs = record["runs"]
    fresh = record["cold_runs"]
    cold = f", {fresh} fresh {'process' if fresh == 1 else 'processes'}" if fresh else ""
    return (
        f"{record['prompt_tokens']} prompt tokens ({visual} visual, "
        f"{record['prompt_tokens'] - visual} text), {record['generated']} generated; "
        f"{runs} {'run' if runs == 1 else 'runs'} of each kind{cold}, each after a warm-up"
    )


def _cold_names(record: Record) -> dict[str, str]:
    """Random weights are made where a checkpoint's would be read."""
    return COLD_NAMES | ({"load": "make weights"} if record["weights"] != CHECKPOINT else {})


def _stages(record: Record, figures: Mapping[str, Figure], width: int) -> list[str]:
    """The stages, their sum, and a warning when they do not add up to the total."""
    names = [name for name in figures if name.startswith(STAGES)]
    lines = ["stages"]
    lines += [_time("  " + name.removeprefix(STAGES), figures[name], width) for name in names]
    lines.append(_time("  whole run", figures["staged total"], width))
    if not record["stages_add_up"]:
        lines += textwrap.wrap(
            f"WARNING: the stages leave out {record['unaccounted']:.1%} of a run, more than "
            f"{UNACCOUNTED:.0%}: this split is not to be trusted",
            width,
        )
    return lines


def _warnings(figures: Mapping[str, Figure], width: int) -> list[str]:
    """A line for each TTFT and rate that is not to be told by its median alone."""
    told = {name: why for name, why in doubts(figures).items() if name in MEANINGS or name in RATES}
    return [
        line
        for name, why in told.items()
        for line in textwrap.wrap(
            f"WARNING: {RATES.get(name, name)}: {why}: repeat on a quiet machine", width
        )
    ]


def _group(
    figures: Mapping[str, Figure], prefix: str, names: Mapping[str, str], width: int
) -> list[str]:
    shown = {prefix + name: text for name, text in names.items() if prefix + name in figures}
    return [_time(f"  {text}", figures[name], width) for name, text in shown.items()]


def _listed(
    heading: str, names: Mapping[str, str], figures: Mapping[str, Figure], form: str, width: int
) -> list[str]:
    rows = [
        _row(f"  {text}", _cells(figures[name], form), "", width)
        for name, text in names.items()
        if name in figures
    ]
    return [heading, *rows] if rows else []


def _time(name: str, figure: Figure, width: int, meaning: str = "") -> str:
    return _row(name, _cells(figure.scaled(1000), "{:,.1f} ms"), meaning, width)


def _cells(figure: Figure, form: str) -> tuple[str, ...]:
    spread = "-" if figure.spread is None else f"{figure.spread:.1%}"
    first = "-" if figure.first is None else form.format(figure.first)
    return form.format(figure.median), form.format(figure.minimum), spread, first


def _row(name: str, cells: Sequence[str], meaning: str, width: int) -> str:
    median, least, spread, first = cells
    row = f"{name:17}{median:>13}{least:>13}{spread:>8}"
    if width >= FULL:
        row += f"{first:>13}"
    return f"{row}  {meaning}" if meaning and width >= SIDE_BY_SIDE else row


def _figure(record: Record) -> Figure:
    return Figure(tuple(record["values"]), record["first"])


def notes(width: int) -> str:
    """How to read the figures; what the TTFTs are, where there was no room beside them."""
    lines = [] if width >= SIDE_BY_SIDE else [f"{name}: {text}" for name, text in MEANINGS.items()]
    lines += NOTES
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines)


def summary(records: Sequence[Record], width: int = 80) -> str:
    """Several cases, a line each, with their ttft_e2e relative to the first case's."""
    columns = ("ttft", "ttft_e2e", "ttft_cold", "decode_tps")
    names = [_short(record) for record in records]
    room = max(map(len, names))
    shown = columns if width >= room + 13 * 4 + 8 else columns[:2]
    heads = ["tokens/s" if name == "decode_tps" else f"{name} ms" for name in shown]
    lines = [" " * room + "".join(f"{head:>13}" for head in heads) + f"{'x first':>9}"]
    said = ["x first: ttft_e2e by the first case's"]
    first = _figure(records[0]["figures"]["ttft_e2e"])
    for name, record in zip(names, records, strict=True):
        cells = [_summary_cell(record, column) for column in shown]
        compared = ratio(_figure(record["figures"]["ttft_e2e"]), first, (name, names[0]))
        if compared.value is None and record is not records[0]:
            said.append(compared.refusal)
        times = "-" if compared.value is None else f"{compared.value:.2f}"
        lines.append(f"{name:{room}}" + "".join(f"{cell:>13}" for cell in cells) + f"{times:>9}")
    return "\n".join([*lines, *(textwrap.fill(line, width) for line in said)])


def _summary_cell(record: Record, column: str) -> str:
    figure = record["figures"].get(column)
    if figure is None:
        return "-"
    factor = 1 if column == "decode_tps" else 1000
    return f"{figure['median'] * factor:,.1f}"


def _short(record: Record) -> str:
    side = f" {record['resolution']}" if record["resolution"] else ""
    bits = f" q{record['bits']}" if record["bits"] else ""
    return f"{record['model']}{side}{bits}"
