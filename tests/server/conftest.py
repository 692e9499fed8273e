"""A real server of the demo model on a port of this machine, for the tests of this folder."""

import base64
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="serving is an extra")
httpx = pytest.importorskip("httpx", reason="serving is an extra")
uvicorn = pytest.importorskip("uvicorn", reason="serving is an extra")

from mlx_vlm_edge import PrefixCache, load  # noqa: E402
from mlx_vlm_edge.generation.engine import Engine  # noqa: E402
from mlx_vlm_edge.server.app import Served, application  # noqa: E402
from mlx_vlm_edge.server.connections import Protocol  # noqa: E402

IMAGES = Path(__file__).parents[2] / "examples" / "images"


def data_url(name: str = "shapes.png") -> str:
    content = (IMAGES / name).read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def question(text: str = "Describe the image.", *urls: str) -> dict:
    """A user's message about pictures, the example's by default."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls or (data_url(),)]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


@contextmanager
def running(served: Served, load_engine=None, **options):
    """The server's address while it runs."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        application(served, load_engine), http=Protocol, ws="none", log_level="error",
        access_log=False, timeout_graceful_shutdown=1, **options,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="session")
def demo():
    return load("demo")


@pytest.fixture(scope="session")
def served(demo):
    return Served("demo", engine=Engine(*demo, prefix_cache=PrefixCache()))


@pytest.fixture(scope="session")
def address(served):
    with running(served) as url:
        yield url


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture
def ask(client):
    """POST to chat/completions; fields override the ordinary question's."""

    def post(**fields):
        return client.post("/v1/chat/completions", json={"messages": [question()], **fields})

    return post
