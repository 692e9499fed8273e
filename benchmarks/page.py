"""Results of all machines -> one self-contained HTML page, for a phone and for a desk."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlx_vlm_edge_bench.claims.read import KINDS, tally
from mlx_vlm_edge_bench.plots import STYLE, Bar, Point, milliseconds, scatter, stacked
from pairs import ratio
from rows import SHOWN

PAPER = Path(__file__).parent / "mlx_vlm_edge_bench" / "claims" / "table6.json"
STAGE = "stage: "
# A model of ours on the accuracy plot: the row of the paper's table it was published as.
PUBLISHED = {
    ("fastvlm-0.5b", 1024): "R5",
    ("fastvlm-1.5b", 1024): "R13",
    ("fastvlm-7b", 1024): "R42",
}
LABELS = {"R2": "OneVision-0.5B", "R5": "0.5B", "R13": "1.5B", "R42": "7B", "R44": "Cambrian-1"}
METHODS = ("FastVLM", "LLaVA-OneVision", "LLaVA-1.5", "MobileVLMv2", "ConvLLaVA", "others")
INTRO = (
    "Time to first token (TTFT) has three names here. <b>ttft</b> is the FastVLM paper's: vision "
    "encoder and prefill. <b>ttft_e2e</b> is from image bytes and prompt to the first token. "
    "<b>ttft_cold</b> is from the start of a process to its first text."
)
TAGS = (
    "<span class='tag measured'>measured</span> on the machine named. "
    "<span class='tag counted'>counted</span> from the model's shapes. "
    "<span class='tag quoted'>quoted</span> from a paper, on the paper's machine. "
    "<span class='tag estimated'>estimated</span> by arithmetic, not run."
)


def tag(kind: str) -> str:
    return f"<span class='tag {kind}'>{kind}</span>"


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The whole page; `results` are the files of benchmarks/results."""
    body = [f"<h1>mlx-vlm-edge: benchmarks</h1><p>{INTRO}</p><p>{TAGS}</p>"]
    body += [machine(result) for result in results]
    body.append(accuracy(results))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>mlx-vlm-edge: benchmarks</title><style>{STYLE}</style></head>\n"
        f"<body>\n{''.join(body)}\n</body></html>\n"
    )


def machine(result: Mapping[str, Any]) -> str:
    """One machine: what it is, then whatever was recorded on it."""
    parts = [f"<h2>{escape(result['name'])}</h2>", about(result["machine"])]
    if cases := result.get("bench", {}).get("cases", []):
        parts += [stages(cases), resolutions(cases), case_table(cases)]
    for block, record in result.get("against_mlx_vlm", {}).items():
        parts.append(against(block, record))
    if found := result.get("claims"):
        parts.append(claims(found))
    return "\n".join(parts)


def about(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    memory = found.get("memory_bytes")
    told = [
        f"{found['chip']}, {found['cores']} cores"
        + (f", {memory / 2**30:.0f} GB" if memory else ""),
        f"{found['os']}, Python {found['python']}, MLX on the {found['device']}",
        f"{versions}; mlx-vlm-edge {found['mlx_vlm_edge']} (commit {found.get('commit')})",
        f"BLAS: {found['blas']}; {found['date']}",
    ]
    return f"<p class='soft'>{'<br>'.join(escape(part) for part in told)}</p>"


def name_of(case: Mapping[str, Any]) -> str:
    """ "fastvlm-0.5b, 512 px, 4-bit, float32"."""
    bits = f"{case['bits']}-bit language model" if case["bits"] else ""
    side = f"{case['resolution']} px" if case["resolution"] else ""
    return ", ".join(part for part in (case["model"], side, bits, case["dtype"]) if part)


def stages_of(case: Mapping[str, Any], value: str = "median") -> dict[str, float]:
    """Milliseconds by stage."""
    figures = case["figures"].items()
    return {
        name.removeprefix(STAGE): 1000 * figure[value]
        for name, figure in figures
        if name.startswith(STAGE)
    }


def stages(cases: Sequence[Mapping[str, Any]]) -> str:
    bars = [Bar(name_of(case), stages_of(case)) for case in cases]
    note = "Staged runs wait for the device after every stage; medians. ttft is vision + prefill."
    return figure("TTFT by stage", stacked(bars, "TTFT by stage"), "measured", note)


def resolutions(cases: Sequence[Mapping[str, Any]]) -> str:
    """ttft and ttft_e2e over the picture's side, a line for each model that has several."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        if case["resolution"]:
            key = ", ".join(part for part in name_of(case).split(", ") if not part.endswith(" px"))
            grouped.setdefault(key, []).append(case)
    lines, names = [], []
    for key, members in grouped.items():
        if len({case["resolution"] for case in members}) < 2:
            continue
        for name in ("ttft", "ttft_e2e"):
            ordered = sorted(members, key=lambda case: case["resolution"])
            lines.append([point(case, name, len(names)) for case in ordered])
            names.append(f"{name} ({key})")
    if not lines:
        return ""
    drawn = scatter(
        [p for line in lines for p in line], names, "TTFT by resolution", "seconds", lines,
        x_log=False, x_name="side of the picture, pixels",
    )  # fmt: skip
    return figure("TTFT by resolution", drawn, "measured", "Medians.")


def point(case: Mapping[str, Any], name: str, series: int) -> Point:
    value = case["figures"][name]["median"]
    told = f"{name} at {case['resolution']} px: {milliseconds(1000 * value)}"
    return Point(case["resolution"], value, series, kind="measured", title=told)


def case_table(cases: Sequence[Mapping[str, Any]]) -> str:
    heads = ("case", "ttft", "ttft_e2e", "ttft_cold", "decode", "prompt", "memory")
    rows = [
        (
            escape(name_of(case)),
            shown(case, "ttft"),
            shown(case, "ttft_e2e"),
            shown(case, "ttft_cold"),
            rate(case),
            f"{case['prompt_tokens']} tokens, {case['visual_tokens']} visual",
            memory(case),
        )
        for case in cases
    ]
    told = f"{cases[0]['weights']}; median (spread) of {cases[0]['runs']} runs"
    return f"<h3>Cases {tag('measured')}</h3><p class='soft'>{escape(told)}.</p>" + grid(
        heads, rows
    )


def shown(case: Mapping[str, Any], name: str) -> str:
    figure = case["figures"].get(name)
    if not figure:
        return "not measured"
    spread = "" if figure["spread"] is None else f" ({figure['spread']:.0%})"
    return f"{milliseconds(1000 * figure['median'])}{spread}"


def rate(case: Mapping[str, Any]) -> str:
    figure = case["figures"].get("decode_tps")
    return f"{figure['median']:.1f} tokens/s" if figure else "not measured"


def memory(case: Mapping[str, Any]) -> str:
    figure = case["figures"].get("rss") or case["figures"]["peak_memory"]
    return f"{figure['median']:.2f} GB"


def against(block: str, record: Mapping[str, Any]) -> str:
    """The table of ratios to mlx-vlm."""
    rows = [against_row(row) for row in record["rows"]]
    peer, threads = record["peer"]["versions"], record["threads"]
    told = (
        f"{record['model']}. mlx-vlm {peer['mlx-vlm']} on the same MLX {peer['mlx']}, same files, "
        f"pictures and prompt ids, in turn; BLAS threads: {threads}. Ratio: of the fastest "
        f"runs, and the median of the pairs. Spread is {record['spread']}. {record['warm']}."
    )
    heads = ("what", "ours", "mlx-vlm", "mlx-vlm / ours", "target")
    title = f"Against mlx-vlm, {block} on both sides"
    return (
        f"<h3>{escape(title)} {tag('measured')}</h3><p class='soft'>{escape(told)}</p>"
        f"<p class='soft'>{escape(agreed(record['parity']))}</p>{grid(heads, rows)}"
    )


def agreed(parity: Mapping[str, Any]) -> str:
    """One line on whether both programs computed the same."""
    told = []
    for model, found in parity.items():
        if found["refusal"]:
            told.append(f"{model}: {found['refusal']}: no ratios")
            continue
        off = max(value for name, value in found.items() if name.startswith("features_off"))
        told.append(
            f"{model}: {len(found['ids'])} greedy ids equal, vision features within {off:.0e}"
        )
    return f"Parity first. {'; '.join(told)}."


def against_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    note = f"<br><span class='soft'>{escape(row['note'])}</span>" if row["note"] else ""
    title = f"{escape(row['title'])}{note}"
    if "not_available" in row:
        return title, "not available", "", escape(row["not_available"]), target(row)
    show = SHOWN[row["unit"]]
    sides = [f"{show(row[side]['min'])} ({row[side]['spread']:.0%})" for side in ("ours", "peer")]
    return title, *sides, escape(ratio(row)), target(row)


def target(row: Mapping[str, Any]) -> str:
    if row["target"] is None:
        return "none set"
    met = row.get("met")
    word = {True: "met", False: "not met", None: "no verdict"}[met]
    kind = {True: "good", False: "bad", None: "soft"}[met]
    return f"{row['target']:g}x <span class='{kind}'>{word}</span>"


def claims(record: Mapping[str, Any]) -> str:
    heads = ("claim", "the paper's figure", "ours", "verdict")
    parts = ["<h3>The papers' claims</h3>"]
    for group, told in tally(record["claims"]):
        members = [one for one in record["claims"] if KINDS[one["kind"]].group == group]
        parts.append(f"<p class='soft'>{len(members)} {group}: {escape(told)}.</p>")
        parts.append(grid(heads, [claim(one) for one in members]))
    return "".join(parts)


def claim(found: Mapping[str, Any]) -> tuple[str, ...]:
    paper = found["paper"]
    machine = "" if paper["machine"].startswith("counted") else paper["machine"]
    source = ". ".join(part for part in (paper["source"], machine, paper["note"]) if part)
    quoted = f"{amount(paper['value'], paper['unit'])} {tag('quoted')}"
    quoted += f"<br><span class='soft'>{escape(source)}</span>"
    kind = "counted" if found.get("how") == "counted" else "measured"
    ours = "not run"
    if found["figure"] is not None:
        ours = f"{amount(found['figure'], found['unit'])} {tag(kind)}"
        if found.get("how") and kind == "measured":
            ours += f"<br><span class='soft'>{escape(found['how'])}</span>"
    if found.get("predicted"):
        ours += f"<br>{found['predicted']:.3g}x by {found.get('predicted_by', 'operations')} "
        ours += tag("estimated")
    colour = {"reproduced": "good", "not reproduced": "bad"}.get(found["verdict"], "soft")
    why = f"<br><span class='soft'>{escape(found['why'])}</span>" if found["why"] else ""
    verdict = f"<span class='{colour}'>{escape(found['verdict'])}</span>{why}"
    return escape(found["title"]), quoted, ours, verdict


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return "no figure"
    if unit == "ms":
        return milliseconds(value)
    return f"{value:.4g}{unit}" if unit == "x" else f"{value:,.4g} {unit}"


def accuracy(results: Sequence[Mapping[str, Any]]) -> str:
    """The paper's accuracy over its TTFT, with our times beside them."""
    table = json.loads(PAPER.read_text(encoding="utf-8"))
    note = (
        f"{table['source']}; {table['machine']}. Rings are our own ttft, measured on the machine "
        "named, at the accuracy that the paper prints for the model. Accuracy is quoted "
        "everywhere; random weights have none, and the same time."
    )
    drawn = [over_ttft(table["rows"], results, score) for score in ("TextVQA", "DocVQA")]
    return f"<h2>Accuracy and TTFT</h2><p class='soft'>{escape(note)}</p>{''.join(drawn)}"


def over_ttft(
    rows: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], score: str
) -> str:
    rows = [row for row in rows if row[score] is not None]
    points = [
        Point(
            row["ttft_ms"], row[score], method(row["method"]), LABELS.get(row["row"], ""),
            title=f"{row['method']}, {row['llm']}, {row['resolution']} px: {row['ttft_ms']:g} ms",
        )
        for row in rows
    ]  # fmt: skip
    published = {row["row"]: row for row in rows}
    for result in results:
        for case in result.get("bench", {}).get("cases", []):
            row = published.get(PUBLISHED.get((case["model"], case["resolution"] or 1024), ""))
            if row:
                time = 1000 * case["figures"]["ttft"]["median"]
                told = f"{name_of(case)} on {result['name']}: {milliseconds(time)}"
                points.append(Point(time, row[score], 0, result["name"], "here", told))
    drawn = scatter(points, METHODS, f"{score} over ttft", f"{score}, %", x_name="ttft")
    return figure(f"{score} over ttft", drawn, "quoted")


def method(name: str) -> int:
    return METHODS.index(name) if name in METHODS else len(METHODS) - 1


def figure(caption: str, drawn: str, kind: str, note: str = "") -> str:
    below = f"<p class='soft'>{escape(note)}</p>" if note else ""
    head = f"<figcaption>{escape(caption)} {tag(kind)}</figcaption>"
    return f"<figure>{head}{drawn}{below}</figure>\n"


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; on a phone each row becomes a card with the heads as labels."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = []
    for first, *rest in rows:
        cells = [
            f"<td data-label='{escape(name)}'>{cell}</td>" if cell else "<td class='empty'></td>"
            for name, cell in zip(heads[1:], rest, strict=True)
        ]
        body.append(f"<tr><td>{first}</td>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>\n"
