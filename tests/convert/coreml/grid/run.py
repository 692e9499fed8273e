"""The whole grid as a table: python -m tests.convert.coreml.grid.run [--json FILE] [--pairs].

Ends with 1 where a cell is neither verified nor refused as it should be. `docs/coreml.md` has the
table of the last whole run.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlx_vlm_edge.errors import UsageError

from .cells import BITS, CELLS, FACTORS, Cell, Grid, Outcome, pairwise
from .models import MODELS


def table(outcomes: Iterable[Outcome]) -> str:
    """By bits, precision and compute units: for each model the largest error over its source
    dtypes, or that it is refused."""
    listed = [*outcomes]
    head = ["--bits", "--precision", "--compute", *MODELS]
    rows = [head, ["---"] * len(head)]
    for bits in BITS:
        for precision in FACTORS[3]:
            for compute in FACTORS[4]:
                own = [
                    each
                    for each in listed
                    if (each.cell.bits, each.cell.precision, each.cell.compute)
                    == (bits, precision, compute)
                ]
                cells = [_cell([each for each in own if each.cell.model == m]) for m in MODELS]
                rows.append(["none" if bits is None else str(bits), precision, compute, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "not run"
    if all(each.refusal for each in outcomes):
        return "refused"
    return f"{max(each.error for each in outcomes):.0e}"


def read(path: Path) -> list[Outcome]:
    """What a run wrote."""
    lines = map(json.loads, path.read_text().splitlines())
    return [Outcome(**line | {"cell": Cell(**line["cell"])}) for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(";")[0])
    parser.add_argument(
        "--json", type=Path, help="a line for each cell; what is there is not rerun"
    )
    parser.add_argument("--pairs", action="store_true", help="only what CI runs")
    args = parser.parse_args(arguments)
    outcomes = read(args.json) if args.json and args.json.exists() else []
    done, wrong = {each.cell for each in outcomes}, 0
    with tempfile.TemporaryDirectory() as root:
        grid = Grid(Path(root))
        pairs = pairwise()
        rest = [cell for cell in CELLS if cell not in pairs and not args.pairs]
        for cell in [*pairs, *sorted(rest, key=lambda cell: cell.source)]:
            if cell in done:
                continue
            try:
                outcomes.append(grid.run(cell))
            except (UsageError, AssertionError) as fault:
                print(f"{cell}: {fault}", flush=True)
                wrong += 1
                continue
            last = outcomes[-1]
            print(f"{cell}: {last.refusal or f'{last.error:.1e}, {last.second:.1e}'}", flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(last.as_json()) + "\n")
    print(table(outcomes))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
