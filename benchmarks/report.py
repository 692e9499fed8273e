"""Recorded results -> the table in the README and one HTML page.

python benchmarks/report.py --add FILE ... --machine NAME   # records of bench, claims, comparison
python benchmarks/report.py [--readme README.md]            # results/*.json -> README, index.html
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_edge_bench.bench.figures import WIDE, Figure, doubts
from mlx_vlm_edge_bench.bench.machine import summary
from mlx_vlm_edge_bench.claims.read import tally
from page import milliseconds, name_of, page
from pairs import ratio
from rows import SHOWN

from mlx_vlm_edge.errors import UsageError

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
RANGES = (
    "Where a range stands, a median would mislead: the runs spread by more than "
    f"{WIDE:.0%}, or a part came out above its whole."
)
KINDS = {"bench": "bench", "claims": "claims", "against mlx-vlm": "against_mlx_vlm"}


def add(results: Path, name: str, files: Sequence[Path]) -> Path:
    """Put records into a machine's file; one of the same kind replaces the older one.

    The comparison has a block for each BLAS, of which rows can be measured again. Raises UsageError
    for a file that is no record, and for records of another chip.
    """
    path = results / f"{name}.json"
    result: dict[str, Any] = read(path) if path.exists() else {"name": name}
    for file in files:
        record = read(file)
        kind = KINDS.get(record.get("kind", ""))
        if kind is None:
            raise UsageError(f"{file}: no record of bench, bench --claims or against_mlx_vlm.py")
        chip, known = record["machine"]["chip"], result.get("machine", record["machine"])["chip"]
        if chip != known:
            raise UsageError(f"{file}: was made on {chip}, {path.name} on {known}")
        result["machine"] = record["machine"]
        if kind == "against_mlx_vlm":
            blocks = result.setdefault(kind, {})
            blocks[record["block"]] = with_older(record, blocks.get(record["block"]))
        else:
            result[kind] = record
    results.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def with_older(record: dict[str, Any], older: Mapping[str, Any] | None) -> dict[str, Any]:
    """A comparison with the rows that only an older one has, if both are of the same programs.

    Every row says when it was measured.
    """
    for row in record["rows"]:
        row.setdefault("date", record["machine"]["date"])
    same = older is not None and all(
        older[side]["versions"] == record[side]["versions"] for side in ("ours", "peer")
    )
    if older is None or not same or older["threads"] != record["threads"]:
        return record
    rows = {row["id"]: row for row in [*older["rows"], *record["rows"]]}
    parity = {**older["parity"], **record["parity"]}
    return record | {"rows": [*rows.values()], "parity": parity}


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from None
    return found


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """What stands in the README: the cases and the comparison of each machine."""
    parts = []
    for result in results:
        about = summary(result["machine"])
        parts.append(f"**{result['name']}** (measured, {result['machine']['date'][:10]}): {about}.")
        if cases := result.get("bench", {}).get("cases", []):
            parts.append(case_rows(cases))
        for block, record in result.get("against_mlx_vlm", {}).items():
            peer = record["peer"]["versions"]["mlx-vlm"]
            parts.append(
                f"Against mlx-vlm {peer}, {block} on both sides (threads: {record['threads']}), "
                f"{record['model']}:"
            )
            parts.append(against_rows(record["rows"]))
        if found := result.get("claims"):
            parts.append(claims_line(found["claims"]))
    return "\n\n".join(parts)


def case_rows(cases: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| case | visual tokens | ttft | ttft_e2e | ttft_cold | decode, tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        figures = {
            name: Figure(tuple(figure["values"])) for name, figure in case["figures"].items()
        }
        times = [
            told(figures, name, lambda seconds: milliseconds(1000 * seconds))
            for name in ("ttft", "ttft_e2e", "ttft_cold")
        ]
        rate = told(figures, "decode_tps", "{:.1f}".format)
        cells = [name_of(case), str(case["visual_tokens"]), *times, rate]
        lines.append(f"| {' | '.join(cells)} |")
    if any(" to " in line for line in lines[2:]):
        lines += ["", RANGES]
    return "\n".join(lines)


def told(figures: Mapping[str, Figure], name: str, show: Callable[[float], str]) -> str:
    """A figure's median; the range of its runs where a median would mislead; "-" without one."""
    if name not in figures:
        return "-"
    figure = figures[name]
    if name not in doubts(figures):
        return show(figure.median)
    if len(figure.values) == 1:
        return f"{show(figure.median)} (one run)"
    return f"{show(figure.minimum)} to {show(max(figure.values))}"


def against_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| what | ours | mlx-vlm | ratio | target |", "|---|---|---|---|---|"]
    for row in rows:
        target = "-" if row["target"] is None else f"{row['target']:g}x"
        if "not_available" in row:
            cells = ["-", "-", f"not available: {row['not_available']}", target]
        else:
            show = SHOWN[row["unit"]]
            met = {True: ", met", False: ", not met", None: ""}[row["met"]]
            cells = [show(row["ours"]["min"]), show(row["peer"]["min"]), ratio(row), target + met]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_line(claims: Sequence[Mapping[str, Any]]) -> str:
    """ "Claims of the papers: counts: 2 reproduced; timings: 1 not compared." """
    told = "; ".join(f"{group}: {verdicts}" for group, verdicts in tally(claims))
    return f"Claims of the papers ({len(claims)}): {told}."


def put(readme: str, table: str) -> str:
    """The README with the table between its markers; the same text gives the same README.

    Raises UsageError when the markers are not there once each, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before:
        raise UsageError(f"the README needs one line {BEGIN} and, below it, one {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", nargs="+", type=Path, metavar="FILE", help="records to put in")
    parser.add_argument("--machine", metavar="NAME", help="whose file: results/NAME.json")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table into it")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    if bool(args.add) != bool(args.machine):
        parser.error("--add and --machine go together")
    if args.add:
        print(add(args.results, args.machine, args.add))
    results = [read(path) for path in sorted(args.results.glob("*.json"))]
    if not results:
        raise UsageError(f"{args.results}: no results yet; --add some")
    (args.results / "index.html").write_text(page(results), encoding="utf-8")
    print(args.results / "index.html")
    if args.readme:
        text = put(args.readme.read_text(encoding="utf-8"), markdown(results))
        args.readme.write_text(text, encoding="utf-8")
        print(args.readme)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(str(error))
