"""Many clients at once, some of them wrong or gone: the others get what each would get alone.

MLX_VLM_EDGE_LONG=1 (`make test-long`) makes it 500 requests; a short version of it runs otherwise.
"""

import gc
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import mlx.core as mx
import pytest

from mlx_vlm_edge import PrefixCache
from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.server.app import Served

from ..demo import KNOWN
from ..tools.long_run import open_files, resident
from .conftest import data_url, question, running

REQUESTS = 500 if os.environ.get("MLX_VLM_EDGE_LONG") else 60
CLIENTS = 16
WRONG = (
    b'{"messages": [',
    b'{"messages": [], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "no_such_field": 1}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "data:image/png;base64,AAAA"}}, {"type": "text", "text": "Hi"}]}]}',
)
PATH = "/v1/chat/completions"


def body(index, *, stream=False):
    row = KNOWN[index % len(KNOWN)]
    messages = [question(row.question, data_url(row.picture))]
    return {"messages": messages, "max_tokens": 40, "stream": stream}


def cut_off(address, index):
    """Half a request; or a whole one whose client leaves at the first piece."""
    content = json.dumps(body(index, stream=True)).encode()
    host, port = address.removeprefix("http://").split(":")
    head = f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        if index % 3 == 0:
            connection.sendall(head.encode() + content[: len(content) // 2])
            return
        connection.sendall(head.encode() + content)
        assert b"200 OK" in connection.recv(1024)


def ask(client, address, index):
    """One request; what is wrong with its answer, "" for nothing."""
    if index % 20 == 7:
        cut_off(address, index)
        return ""
    if index % 20 == 13:
        answer = client.post(PATH, content=WRONG[index // 20 % len(WRONG)],
                             headers={"Content-Type": "application/json"})  # fmt: skip
        return "" if answer.status_code in (400, 422) else f"{index}: {answer.status_code}"
    row, stream = KNOWN[index % len(KNOWN)], index % 2 == 0
    answer = client.post(PATH, json=body(index, stream=stream))
    if answer.status_code != 200:
        return f"{index}: {answer.status_code} {answer.text}"
    said = _streamed(answer.text) if stream else answer.json()["choices"][0]["message"]["content"]
    return "" if said == row.answer else f"{index}: {said!r} for {row.answer!r}"


def _streamed(text):
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    pieces = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(piece["delta"].get("content") or "" for piece in pieces)


def idle(engine):
    """Wait until the engine has nothing left to do."""
    while engine.answering or engine.waiting:
        time.sleep(0.01)
    gc.collect()


@pytest.fixture
def engine(demo):
    engine = Engine(*demo, prefix_cache=PrefixCache(4 << 20))
    yield engine
    engine.close()


def test_sixteen_clients(engine):
    def soak(numbers):
        with httpx.Client(base_url=address, timeout=120) as client:
            return [wrong for index in numbers if (wrong := ask(client, address, index))]

    def round_of(start, stop):
        shares = [range(start + client, stop, CLIENTS) for client in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as clients:
            wrong = [line for lines in clients.map(soak, shares) for line in lines]
        assert wrong == []
        idle(engine)
        floors.append((mx.get_active_memory(), resident()))

    def around():
        gc.collect()
        return sorted(thread.name for thread in threading.enumerate()), open_files()

    floors = []
    others, before = {*threading.enumerate()}, around()
    with running(Served("demo", engine=engine)) as address:
        parts = 10 if REQUESTS > 100 else 3
        for part in range(parts):
            round_of(REQUESTS * part // parts, REQUESTS * (part + 1) // parts)
    for thread in {*threading.enumerate()} - others:  # told to end when their loop did
        thread.join(timeout=30)
    threads, files = around()
    assert threads == before[0]
    assert files <= before[1]  # fewer where a file of the model's was still open
    active = [floor[0] for floor in floors]
    assert active[-1] <= 1.02 * active[parts // 3]
    if parts == 10:  # pages go and come: a leak shows in what is never given back
        held = [floor[1] for floor in floors]
        print(f"resident {[round(size / 1e6) for size in held]} MB")
        assert min(held[-4:]) <= 1.02 * min(held[3:7])
