"""Addresses, servers and the Hub: what comes from elsewhere."""

import base64
import random
import socket
import threading
from pathlib import Path
from typing import Any

from mlx_vlm_edge.picture import fetch
from mlx_vlm_edge.picture.image import open_image

from .harness import Attempt
from .mutate import odd, spoiled

PIECES = (
    "http", "https", "ftp", "file", "data", "javascript", ":", "//", "/", "///", "\\", "@", "#",
    "?", "127.0.0.1", "[::1]", "[", "]", "localhost", ":1", ":99999", ":-1", ":x", "user:pw@",
    "..", "%00", "%", "%zz", "\x00", "\n", "\r\nHost: x", "é", "日本", "\ud800", " ", "a.png",
    "a" * 300, ".", "xn--", ";base64,", "iVBORw0KGgo=", ",", "image/png", "=", "\u2028", "0x7f.1",
    "2130706433",
)  # fmt: skip
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)


def prepare_addresses(_: Path) -> Attempt:
    server = _Server()
    look_up = socket.getaddrinfo

    def near(host: Any, *rest: Any, **named: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1"):
            raise socket.gaierror("no such host here")
        return look_up(host, *rest, **named)

    fetch.socket.getaddrinfo = near
    fetch.urllib.request.getproxies = dict
    fetch.DOWNLOAD_TIMEOUT = 2

    def attempt(rng: random.Random) -> None:
        if rng.random() < 0.6:
            address = "".join(rng.choices(PIECES, k=rng.randint(1, 9)))
            if rng.random() < 0.6:
                address = (
                    rng.choice(("http://", "data:", "file://", "https://127.0.0.1/")) + address
                )
            image = open_image(
                address if "://" in address or address[:5] == "data:" else f"data:{address}"
            )
        else:
            image = open_image(server.serve(_answer(rng)))
        assert image.mode == "RGB"

    return attempt


def _answer(rng: random.Random) -> bytes:
    size = b"Content-Length: %d\r\n" % rng.choice((len(PNG), len(PNG), 0, 10**12, 5))
    place = rng.choice((b"/x", b"ftp://x/", b"http://[", b"//\xff", b""))
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(PNG), PNG)
    whole = rng.choice((
        b"HTTP/1.1 200 OK\r\n" + size + b"\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\n" + chunked,
        b"HTTP/1.1 100 Continue\r\n\r\n" * rng.choice((1, 50)) + b"HTTP/1.0 200 OK\r\n\r\n" + PNG,
        b"HTTP/1.1 302 Go\r\nLocation: " + place + b"\r\n\r\n",
        b"HTTP/1.1 500 \x1b[31mNo\r\n\r\n", b"HTTP/1.1 404 Not\r\nX: \xff\r\n\r\n",
        b"", b"\x16\x03\x01",
    ))  # fmt: skip
    return spoiled(whole, rng) if rng.random() < 0.7 and whole else whole


class _Server:
    """Answers every connection with the bytes that were set."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._answer = b""
        threading.Thread(target=self._run, daemon=True).start()

    def serve(self, answer: bytes) -> str:
        self._answer = answer
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/a.png"

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                try:
                    connection.settimeout(2)
                    connection.recv(65536)
                    connection.sendall(self._answer)
                except OSError:
                    continue


def prepare_hub(_: Path) -> Attempt:
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    from mlx_vlm_edge.hub import download

    sound = {
        "id": "org/name", "sha": "0" * 40, "tags": ["license:mit"], "private": False,
        "likes": 2, "downloads": 1, "gated": False,
        "cardData": {"license": "mit", "license_name": "x"},
        "siblings": [
            {"rfilename": "config.json", "size": 10, "blobId": "a" * 40},
            {"rfilename": "tokenizer.json", "size": 10, "blobId": "b" * 40},
            {"rfilename": "model.safetensors", "size": 1000, "blobId": "c" * 40,
             "lfs": {"size": 1000, "sha256": "d" * 64, "pointerSize": 130}},
            {"rfilename": "../../x.safetensors", "size": 1, "blobId": "e" * 40},
        ],
    }  # fmt: skip
    answer: dict[str, Any] = {}

    class Api:
        def model_info(self, *_: Any, **__: Any) -> ModelInfo:
            return ModelInfo(**answer)

    huggingface_hub.HfApi = Api  # type: ignore[misc,assignment]

    def attempt(rng: random.Random) -> None:
        answer.clear()
        answer.update(odd(sound, rng) if rng.random() < 0.97 else sound)
        remote = download.describe("org/name")
        assert remote.licence.isprintable()
        assert all(type(file.size) is int and file.size >= 0 for file in remote.files.values())
        assert not any(".." in name or name.startswith("/") for name in remote.files)

    return attempt
