"""mlx-vlm and mlx-vlm-edge on the same checkpoint, pictures and prompts, in turn: the ratios.

python benchmarks/against_mlx_vlm.py --peer-python PATH [--peer-python-with-torch PATH]
    [--rows ID ...] [--runs N] [--blas PATH|stock] [--threads N] [--json FILE]

First both must agree: the same greedy ids with a picture, the same vision features. Then every row
is measured in pairs, one program right after the other. No ratio is told when they disagree or
when the runs lie too far apart. Neither block of figures predicts another machine.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import random_checkpoint
import rows as table
from mlx_vlm_edge_bench.bench import machine
from mlx_vlm_edge_bench.bench.saved import writable
from pairs import Pairs, ratio, verdict
from rows import COLD, FIXED, MEMORY, QUESTION, SHOWN, Row, chat, draw, view
from sides import STOCK, FailedError, Side, Worker, pair

from mlx_vlm_edge.errors import UsageError

Save = Callable[[Mapping[str, Any]], None]

TRIES = 3  # of a row whose runs lie too far apart; all are recorded
TOKENS = 16  # that must be equal
CLOSE = 1e-5  # relative error of the vision features
SAMPLE = 0.2  # seconds a timed sample should take at least; shorter ones are repeated
REPEATS = 64
PARITY_SIDES = (256, 512)
SMALL = 256
MET = {True: "met", False: "NOT met", None: "without a verdict"}
DEFECTS = (
    "mlx-vlm 0.7.10 puts text on the wrong side of the second image",
    "mlx-vlm 0.7.10 takes a picture whose brightest value is 1 of 255 for white",
    "mlx-vlm 0.7.10 answers from a cut context when its prompt cache meets an image",
)
Runner = Callable[[], tuple[float, dict[str, Any]]]


@dataclass
class Bench:
    """What all rows share, and the record that grows."""

    ours: Side
    peer: Side
    peer_with_torch: Side | None
    folders: dict[str, Path]
    small: Path
    photo: Path
    scratch: Path
    runs: int | None
    record: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def samples(run: tuple[Runner, Runner], count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One warm-up of each side, then `count` pairs, the order turned round each time."""
    firsts, values, replies = [], ([], []), []
    for side in (0, 1):
        seconds, reply = run[side]()
        firsts.append(seconds)
        replies.append(reply)
    for index in range(count):
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            values[side].append(run[side]()[0])
        say(f"  pair {index + 1} of {count}: ours {values[0][-1]:.4g}, peer {values[1][-1]:.4g}")
    return {"values": values, "warm_up": firsts, "replies": replies}


def repeated(worker: Worker, order: Mapping[str, Any]) -> Runner:
    """A warm run's mean over as many goes as make a sample long enough to be timed."""
    goes = 0

    def run() -> tuple[float, dict[str, Any]]:
        nonlocal goes
        reply = worker.ask(order)
        if "missing" in reply:
            raise NotAvailableError(reply["missing"])
        if not goes:  # the first one is the warm-up
            goes = max(1, min(REPEATS, math.ceil(SAMPLE / reply["seconds"])))
            return reply["seconds"], reply
        more = [worker.ask(order)["seconds"] for _ in range(goes - 1)]
        return (reply["seconds"] + sum(more)) / goes, reply

    return run


class NotAvailableError(RuntimeError):
    """One of the programs has no such thing in its version."""


def runners(bench: Bench, row: Row, workers: tuple[Worker, Worker] | None) -> tuple[Runner, Runner]:
    """How one run of a row goes on either side."""
    if workers is not None:
        return repeated(workers[0], row.order), repeated(workers[1], row.order)
    peer = bench.peer
    if row.with_torch:
        if bench.peer_with_torch is None:
            raise NotAvailableError("give --peer-python-with-torch")
        peer = bench.peer_with_torch
    both = (bench.ours, peer)
    if row.kind == COLD:
        return tuple(lambda s=side: s.first_text(command(bench, row, s)) for side in both)
    folder = view(bench.folders[row.model], 512 if row.kind == MEMORY else SMALL,
                  bench.scratch / f"{row.model}-{row.kind}")  # fmt: skip
    order = {"folder": str(folder), "prompt": chat(QUESTION), "image": str(bench.small)}
    if row.kind == FIXED:
        return tuple(lambda s=side: s.once({"do": "ready", **order, **row.order}) for side in both)

    def memory(side: Side) -> tuple[float, dict[str, Any]]:
        reply = side.once({"do": "memory", "tokens": TOKENS, **order})[1]
        return reply["rss"], reply

    return tuple(lambda s=side: memory(s) for side in both)


def command(bench: Bench, row: Row, side: Side) -> list[str]:
    """The command line of either program, the same words of a user's."""
    folder = view(bench.folders[row.model], SMALL, bench.scratch / f"{row.model}-cold")
    asked = ["--model", str(folder), "--image", str(bench.small), "--prompt", QUESTION]
    module = ["mlx_vlm_edge", "generate"] if side.name == "ours" else ["mlx_vlm.generate"]
    return ["-m", *module, *asked, "--max-tokens", "1"]


def measure(bench: Bench, row: Row, workers: tuple[Worker, Worker] | None) -> dict[str, Any]:
    """A row's record; retried while its runs lie too far apart."""
    described = {"id": row.id, "title": row.title, "unit": row.unit, "note": row.note}
    described |= {"kind": row.kind, "model": row.model}
    load = [machine.load_average()]
    refusal = bench.record["parity"].get(row.model, {}).get("refusal", "no parity was shown")
    attempts: list[dict[str, Any]] = []
    try:
        described["checked"] = checked(bench, row, workers)
        for attempt in range(TRIES):
            bench.say(f"{row.id}: attempt {attempt + 1} of at most {TRIES}")
            found = samples(runners(bench, row, workers), bench.runs or row.runs, bench.say)
            attempts.append(found)
            load.append(machine.load_average())
            if not Pairs(*found["values"]).refusal:
                break
    except NotAvailableError as missing:
        return described | {"target": row.target, "not_available": str(missing)}
    refusal = refusal or disagreement(attempts[-1]["replies"])
    pairs = [Pairs(*attempt["values"]) for attempt in attempts]
    details = [
        {k: v for k, v in reply.items() if k != "found"} for reply in attempts[-1]["replies"]
    ]
    return described | {
        **verdict(pairs, row.target, refusal),
        "load_average": load,
        "attempts": [{"values": a["values"], "warm_up": a["warm_up"]} for a in attempts],
        "details": dict(zip(("ours", "peer"), details, strict=True)),
    }


def disagreement(replies: Sequence[Mapping[str, Any]]) -> str:
    """Why two sides' answers of the same row are no base for a ratio; "" when they agree."""
    ours, peer = (reply.get("found") for reply in replies)
    return "" if ours == peer else f"the answers differ: ours {ours}, peer {peer}"


def checked(bench: Bench, row: Row, workers: tuple[Worker, Worker] | None) -> dict[str, Any]:
    """For pictures: how far the pixels of both sides are apart, in 1/255."""
    if row.order.get("do") != "time_jpeg" or workers is None:
        return {}
    arrays = []
    for worker in workers:
        file = str(bench.scratch / f"pixels-{worker.name}.npy")
        reply = worker.ask({**row.order, "do": "pixels", "file": file})
        if "missing" in reply:
            raise NotAvailableError(reply["missing"])
        arrays.append(np.load(file) * 255)
    off = np.abs(arrays[0] - arrays[1])
    exact = bool(off.max() < 0.01)
    return {"max_off": float(off.max()), "mean_off": float(off.mean()), "exact": exact}


def parity(bench: Bench, workers: tuple[Worker, Worker]) -> dict[str, Any]:
    """Whether both programs compute the same; `refusal` says where they do not."""
    prompt, image = chat(QUESTION), str(bench.small)
    found: dict[str, Any] = {"refusal": ""}
    texts = [w.ask({"do": "ids", "question": QUESTION, "image": image, "side": SMALL})["ids"]
             for w in workers]  # fmt: skip
    found["prompt_ids"] = collapsed(texts[1])
    if collapsed(texts[0]) != collapsed(texts[1]):
        found["refusal"] = "the templates make different prompt ids"
    ask = {"do": "answer", "prompt": prompt, "image": image, "tokens": TOKENS, "side": SMALL}
    ids = [worker.ask(ask)["ids"] for worker in workers]
    found["ids"] = ids[0]
    if ids[0] != ids[1]:
        found["refusal"] = f"greedy ids differ: ours {ids[0]}, peer {ids[1]}"
    if len(set(ids[0])) < 3:
        found["refusal"] = f"a constant answer proves nothing: {ids[0]}"
    for side in PARITY_SIDES:
        arrays = []
        for worker in workers:
            file = str(bench.scratch / f"features-{worker.name}.npy")
            worker.ask({"do": "features", "image": image, "side": side, "file": file})
            arrays.append(np.load(file))
        off = float(np.linalg.norm(arrays[0] - arrays[1]) / np.linalg.norm(arrays[1]))
        found[f"features_off_{side}"] = off
        if not off < CLOSE:
            found["refusal"] = f"vision features at {side} px are off by {off:.1e} (relative)"
    return found


def collapsed(ids: Sequence[int]) -> list[int]:
    """Ids with each run of placeholders as one: [7, -200, -200, 8] -> [7, -200, 8]."""
    pairs = zip([None, *ids], ids, strict=False)
    return [new for old, new in pairs if not (new == old == -200)]


@contextmanager
def loaded(bench: Bench, model: str) -> Iterator[tuple[Worker, Worker]]:
    """Both programs with a checkpoint in memory, in two processes."""
    workers = bench.ours.open(), bench.peer.open()
    try:
        for worker in workers:
            seconds = worker.ask({"do": "load", "folder": str(bench.folders[model])})["seconds"]
            bench.say(f"{worker.name}: {model} loaded in {seconds:.1f} s")
        yield workers
    finally:
        for worker in workers:
            worker.close()


def describe(bench: Bench, workers: tuple[Worker, Worker]) -> None:
    """Versions and BLAS of both sides. Raises FailedError when they are no fair pair."""
    for worker in workers:
        about = worker.ask({"do": "versions"}) | {"blas": worker.ask({"do": "blas"})}
        bench.record[worker.name] = about
        bench.say(f"{worker.name}: {about['versions']}, {about['blas']['gflops']:.0f} GF/s")
    ours, peer = bench.record["ours"], bench.record["peer"]
    bench.record["machine"]["blas"] = ours["blas"]["status"]
    if ours["versions"]["mlx"] != peer["versions"]["mlx"]:
        raise FailedError(f"MLX differs: {ours['versions']['mlx']} and {peer['versions']['mlx']}")
    fast, slow = sorted((ours["blas"]["gflops"], peer["blas"]["gflops"]), reverse=True)
    if fast > 3 * slow:
        raise FailedError(f"the matrix library differs: {fast:.0f} and {slow:.0f} GF/s")


def compare(bench: Bench, chosen: Sequence[Row], save: Save) -> None:
    """Parity, then the rows: warm ones while a checkpoint is loaded, the others in between."""
    for model in sorted({row.model for row in chosen}):
        with loaded(bench, model) as workers:
            if "ours" not in bench.record:
                describe(bench, workers)
            bench.say(f"{model}: parity")
            bench.record["parity"][model] = parity(bench, workers)
            bench.say(f"{model}: {bench.record['parity'][model]}")
            save(bench.record)
            for row in chosen:
                if row.model == model and row.kind == table.WARM:
                    add(bench, row, workers, save)
        for row in chosen:
            if row.model == model and row.kind != table.WARM:
                add(bench, row, None, save)


def add(
    bench: Bench,
    row: Row,
    workers: tuple[Worker, Worker] | None,
    save: Save,
) -> None:
    bench.record["rows"].append(measure(bench, row, workers))
    save(bench.record)
    print(line(bench.record["rows"][-1]), flush=True)


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    if "not_available" in row:
        return f"{row['title']}: not available ({row['not_available']})"
    show = SHOWN[row["unit"]]
    both = f"ours {show(row['ours']['min'])}, peer {show(row['peer']['min'])}"
    target = "" if row["target"] is None else f"; target {row['target']}x {MET[row['met']]}"
    return f"{row['title']}: {both}: {ratio(row)}{target}"


def checkpoints(folder: Path, models: set[str], say: Callable[[str], None]) -> dict[str, Path]:
    """fastvlm-0.5b-f32 and -q4 with random weights in a folder, made where they are not there."""
    found = {}
    for model, bits in (("f32", None), ("q4", 4)):
        path = found[model] = folder / f"fastvlm-0.5b-{model}"
        if model in models and not (path / "tokenizer_config.json").is_file():
            say(f"writing {path}")
            random_checkpoint.write(path, bits=bits)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer-python", required=True, metavar="PATH", help="has mlx-vlm, no torch"
    )
    parser.add_argument("--peer-python-with-torch", metavar="PATH")
    parser.add_argument("--our-python", metavar="PATH", help="default: this one")
    parser.add_argument(
        "--blas", default="libopenblas.so.0" if sys.platform == "linux" else STOCK,
        help="a library for both sides, or stock (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), metavar="N",
        help="of the BLAS, for both sides (default: %(default)s, the cores of this machine)",
    )  # fmt: skip
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: made, 3.3 GB")
    parser.add_argument("--rows", nargs="+", metavar="ID", help="`list` shows them")
    parser.add_argument("--runs", type=int, metavar="N", help="pairs of each row")
    parser.add_argument("--json", metavar="FILE", help="written after every row")
    args = parser.parse_args()
    for name in ("runs", "threads"):
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"--{name} {number}: give 1 or more")
    return args


def programs(args: argparse.Namespace) -> tuple[Side, Side, Side | None]:
    """Ours, the peer without torch and the one with it. Raises FailedError when torch is amiss."""
    ours, peer = pair(args.our_python, args.peer_python, args.blas, args.threads)
    if peer.has("torch"):
        raise FailedError("--peer-python has torch; name an environment without: it loads faster")
    if not args.peer_python_with_torch:
        return ours, peer, None
    other = pair(None, args.peer_python_with_torch, args.blas, args.threads)[1]
    if not other.has("torch"):
        raise FailedError("--peer-python-with-torch has no torch")
    return ours, peer, other


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as temporary, writable(args.json) as save:
        scratch = Path(temporary)
        small = draw(scratch / "picture.jpg", 640, 480)
        photo = draw(scratch / "photo.jpg", 4032, 3024)
        every = table.rows(small, photo)
        chosen = [row for row in every if not args.rows or row.id in args.rows]
        if unknown := set(args.rows or ()) - {row.id for row in every} or not chosen:
            print("\n".join(f"{row.id:12} {row.title}" for row in every))
            sys.exit(0 if args.rows == ["list"] else f"no such row: {', '.join(sorted(unknown))}")
        ours, peer, other = programs(args)
        say = Bench(ours, peer, other, {}, small, photo, scratch, None).say
        folder = args.checkpoints or scratch
        folders = checkpoints(folder, {row.model for row in chosen}, say)
        bench = Bench(ours, peer, other, folders, small, photo, scratch, args.runs)
        bench.record = header(args, other is not None)
        compare(bench, chosen, save)


def header(args: argparse.Namespace, with_torch: bool) -> dict[str, Any]:
    """What the figures were made by and on."""
    return {
        "kind": "against mlx-vlm",
        "block": "stock" if args.blas == STOCK else "fast BLAS",
        "blas": args.blas,
        "threads": args.threads,
        "machine": machine.record(),
        "model": "FastVLM-0.5B, random weights, float32 or a 4-bit language model",
        "command": "against_mlx_vlm.py "
        f"--blas {os.path.basename(args.blas)} --threads {args.threads}",
        "warm": "Page cache and MLX's compile cache warm: one run of each side goes before",
        "peer_without_torch": True,
        "peer_with_torch": with_torch,
        "known_defects_of_the_peer": list(DEFECTS),
        "spread": "(slowest - fastest) / fastest of the fastest three quarters of a side's runs",
        "parity": {},
        "rows": [],
    }


if __name__ == "__main__":
    try:
        main()
    except (FailedError, UsageError) as failed:
        sys.exit(str(failed))
