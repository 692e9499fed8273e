"""Tokens per second of `serve` with requests answered together and one after the other.

python benchmarks/serve_throughput.py FOLDER [--clients 1 4 8] [--tokens N] [--rounds N] [-o FILE]

One server over HTTP, its clients in threads of the same process, a picture and a question of its
own for each. In every round both ways are measured in turn, so that what else the machine does
meets both; the ratio is of each pair. Processor time is told beside the clock's, since a shared
machine stretches only the latter.
"""

import argparse
import base64
import http.client
import io
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from mlx_vlm_edge_bench.bench import machine
from PIL import Image

from mlx_vlm_edge import load
from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.server.app import Served, application

TOGETHER = 8  # rows of the server, as by default
WAYS = {"one at a time": 1, "together": TOGETHER}


def body(index: int, tokens: int, side: int) -> str:
    """A request with a picture and a question that no other client has."""
    picture = io.BytesIO()
    Image.new("RGB", (side, side), (31 * index % 256, 90, 160)).save(picture, "png")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"Describe picture {index} in two sentences."},
    ]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": tokens})


def ask(port: int, text: str) -> int:
    """Tokens of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(
        "POST", "/v1/chat/completions", text, {"Content-Type": "application/json"}
    )  # fmt: skip
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return int(answer["usage"]["completion_tokens"])


def measure(port: int, bodies: Sequence[str]) -> dict[str, float]:
    """All of the requests at once: tokens, seconds by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(bodies)) as pool:
        tokens = sum(pool.map(lambda text: ask(port, text), bodies))
    return {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - wall, 4),
        "cpu_seconds": round(time.process_time() - cpu, 4),
    }


@contextmanager
def serving(engine: Engine) -> Iterator[int]:
    """The port of a server of this engine."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(application(Served("measured", engine=engine)), log_level="error")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def figures(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Rates of each way, and the ratios of the pairs: median, minimum, maximum."""

    def rates(way: str, clock: str) -> list[float]:
        return [run[way]["tokens"] / run[way][clock] for run in runs]

    told: dict[str, Any] = {}
    for clock in ("seconds", "cpu_seconds"):
        ways = {way: rates(way, clock) for way in WAYS}
        pairs = [b / a for a, b in zip(*ways.values(), strict=True)]
        told[f"tokens per {clock.removesuffix('s')}"] = {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in {**ways, "ratio": pairs}.items()
        }
    return told


def write(
    args: argparse.Namespace,
    runs: Mapping[int, Sequence[dict[str, dict[str, float]]]],
    loads: Sequence[float | None],
) -> None:
    """The record so far, so that a run that is cut off leaves its whole rounds."""
    record = {
        "kind": "serve throughput", "machine": machine.record(), "model": Path(args.folder).name,
        "tokens of an answer": args.tokens, "side": args.side, "load averages": loads,
        "clients": {str(count): {**figures(of), "runs": of} for count, of in runs.items()},
    }  # fmt: skip
    text = json.dumps(record, indent=1) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="such as benchmarks/random_checkpoint.py writes")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="write the record here")
    args = parser.parse_args()
    model, processor = load(args.folder, resolution=args.side)
    engine = Engine(model, processor, rows=TOGETHER)
    runs: dict[int, list[dict[str, dict[str, float]]]] = {count: [] for count in args.clients}
    loads = [machine.load_average()]
    with serving(engine) as port:
        ask(port, body(0, 2, args.side))
        for turn in range(args.rounds):
            for count in args.clients:
                bodies = [body(index, args.tokens, args.side) for index in range(count)]
                pair = {}
                for way in list(WAYS)[:: 1 if turn % 2 else -1]:
                    engine.rows_limit = WAYS[way]
                    pair[way] = measure(port, bodies)
                runs[count].append(pair)
                print(count, pair, flush=True)
            loads.append(machine.load_average())
            write(args, runs, loads)
    engine.close()


if __name__ == "__main__":
    main()
