"""Every limit and guard of the server, tried by a request that would break it."""

import asyncio
import base64
import copy
import io
import json
import logging
import socket
import ssl
import sys
import threading
import time
import zlib
from queue import SimpleQueue
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from starlette.datastructures import Headers

from mlx_vlm_edge import Options
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.picture import fetch
from mlx_vlm_edge.server import connections, openai, remote, requests
from mlx_vlm_edge.server.answering import Answering, Asked
from mlx_vlm_edge.server.app import Served, application
from mlx_vlm_edge.server.errors import ApiError
from mlx_vlm_edge.server.guards import LOCAL_NAMES, OWN_HEADERS, Access
from mlx_vlm_edge.server.limits import Limits

from .conftest import data_url, question, running

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def refusal(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "[::2]"])
def test_another_host_name_is_not_answered(client, host):
    refusal(client.get("/v1/models", headers={"host": host}), 421)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_pages_of_other_origins_may_not_use_the_server(client, origin):
    response = client.post(CHAT, json=HELLO, headers={"origin": origin})
    refusal(response, 403)
    preflight = client.options(
        CHAT, headers={"origin": origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 403
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_an_origin_that_was_named_may(served):
    page = "https://page.example"
    with running(Served("demo", access=Access(origins=(page,)), engine=served.engine)) as url:
        asked = httpx.options(url + CHAT, headers={"origin": page})
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == page
        answer = httpx.post(url + CHAT, json=HELLO, headers={"origin": page})
        assert answer.headers["access-control-allow-origin"] == page
        assert answer.headers["access-control-expose-headers"] == "Retry-After"
        assert "access-control-allow-credentials" not in answer.headers


# As OpenAI's and Anthropic's clients send them from a browser.
CLIENTS = (
    "anthropic-beta,anthropic-dangerous-direct-browser-access,anthropic-version,authorization,"
    "content-type,x-api-key,x-stainless-arch,x-stainless-lang,x-stainless-os,"
    "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,"
    "x-stainless-runtime-version,x-stainless-timeout"
)


@pytest.mark.parametrize(("asked", "allowed"), [
    (CLIENTS, CLIENTS), ("X-One, x_two", "X-One, x_two"), ("", OWN_HEADERS), ("*/*", OWN_HEADERS),
    ("a b", OWN_HEADERS), ("a,,b", OWN_HEADERS), ("a," * 1023 + "abc", OWN_HEADERS),
])  # fmt: skip
def test_a_named_page_s_scripts_send_the_headers_they_ask_for(asked, allowed):
    page = "https://page.example"
    headers = Headers({"origin": page, "access-control-request-headers": asked})
    told = dict(Access(origins=(page,)).cors(headers))
    assert told[b"access-control-allow-headers"].decode() == allowed
    assert Access().cors(headers) == []


def test_the_page_s_own_origin_may(client, address):
    assert client.post(CHAT, json=HELLO, headers={"origin": address}).status_code == 200


def test_a_key_is_needed_where_one_is_set(served):
    with running(Served("demo", access=Access(key="secret"), engine=served.engine)) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"},
                        {"x-api-key": "ſecret"}):  # fmt: skip
            sent = {name: value.encode() for name, value in headers.items()}
            told = refusal(httpx.post(url + CHAT, json=HELLO, headers=sent), 401)["message"]
            assert told.startswith("the API key is not" if headers else "an API key is needed")
        for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert httpx.post(url + CHAT, json=HELLO, headers=headers).status_code == 200
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/metrics").status_code == 401
        assert httpx.options(url + CHAT).status_code == 401
        # The page is where a browser's user types the key in.
        for path in ("/", "/page.js", "/page.css", "/icon.svg"):
            assert httpx.get(url + path).status_code == 200


def test_another_method_is_told_which_one_an_address_takes(client):
    for method in ("OPTIONS", "GET", "DELETE"):
        response = client.request(method, CHAT)
        refusal(response, 405)
        assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("named", [
    "/etc/passwd", "file:///etc/passwd", "file:///no/such/file", "http://127.0.0.1:1/x.png",
    "https://example.org/x.png", "ftp://x", "x.png", "", "DATA", "~/x.png",
])  # fmt: skip
def test_local_paths_and_other_addresses_get_the_same_words(client, named):
    error = refusal(client.post(CHAT, json={"messages": [question("x", named)]}), 400)
    field = "messages.0.content.0.image_url"
    assert error["param"] == field
    assert error["message"] == f"{field}: an image must be a data: URL (data:image/png;base64,...)"


def test_a_body_that_is_too_large(served):
    limits = Limits(body_bytes=10_000)
    with running(Served("demo", limits, engine=served.engine)) as url:
        secret = "sesame" * 5000
        error = httpx.post(url + CHAT, json={"messages": secret})
        assert refusal(error, 413)
        assert "sesame" not in error.text

        def endless():
            for _ in range(100):
                yield b" " * 1000

        response = httpx.post(url + CHAT, content=endless())
        assert refusal(response, 413)
        assert httpx.post(url + CHAT, json=HELLO).status_code == 200


def png(width, height):
    """A PNG that says it has width x height pixels, and nothing else."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def asked_about(content):
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"messages": [question("x", url)]}


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(client, monkeypatch):
    from PIL import ImageFile

    def decoding(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoding)
    error = refusal(client.post(CHAT, json=asked_about(png(12_000, 12_000))), 413)
    assert error["code"] == "image_too_large"


@pytest.mark.parametrize("content", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"])
def test_what_is_no_picture_is_refused_and_never_echoed(client, content):
    response = client.post(CHAT, json=asked_about(content))
    error = refusal(response, 400)
    assert error["param"] == "messages.0.content.0.image_url"
    assert "no picture" not in response.text
    damaged = question("x", "data:image/png;base64,@@sesame@@")
    response = client.post(CHAT, json={"messages": [damaged]})
    refusal(response, 400)
    assert "sesame" not in response.text


def test_pictures_are_judged_as_elsewhere(client, monkeypatch):
    """A HEIC photo is read where its package is here, and asks for it where not; PDFs are not
    pictures."""
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    told = refusal(client.post(CHAT, json=asked_about(b"%PDF-1.7 x")), 400)["message"]
    assert "PDFs are not taken" in told
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pi_heif", None)
        told = refusal(client.post(CHAT, json=asked_about(heic)), 400)["message"]
        assert "pip install pi-heif" in told
    known = []
    heif = SimpleNamespace(register_heif_opener=lambda: known.append("HEIF"))
    monkeypatch.setitem(sys.modules, "pi_heif", heif)
    refusal(client.post(CHAT, json=asked_about(heic)), 400)
    assert known == ["HEIF"]


def test_too_many_pictures(client):
    messages = [question("x", *[data_url()] * 17)]
    assert refusal(client.post(CHAT, json={"messages": messages}), 400)["code"] == "too_many"


def test_errors_do_not_repeat_what_was_sent(client):
    for body in (
        {"messages": [{"role": "sesame", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "sesame"}]}]},
        {"messages": "sesame"}, {"messages": [{"role": "user", "content": "x"}], "n": "sesame"},
        {"messages": [{"role": "user", "content": "x"}], "model": "sesame"},
    ):  # fmt: skip
        response = client.post(CHAT, json=body)
        assert response.status_code in (400, 404)
        assert "sesame" not in response.text


@pytest.fixture
def endless(demo):
    """An engine of one row whose answers do not end by themselves."""
    model, processor = demo
    processor = copy.copy(processor)
    processor.eos_ids = frozenset()
    engine = Engine(model, processor, rows=1, waiting=1)
    yield engine
    engine.close()


def test_a_full_line_answers_429_with_when_to_try_again(endless):
    inputs = endless.processor("Describe the image.")
    arrived = SimpleQueue()
    first = endless.submit(inputs, Options(max_tokens=2000), arrived.put)
    arrived.get()
    second = endless.submit(inputs, Options(max_tokens=2), lambda piece: None)
    with running(Served("demo", Limits(rows=1, waiting=1), engine=endless)) as url:
        response = httpx.post(url + CHAT, json=HELLO, timeout=60)
        first.cancel()
        second.cancel()
    assert refusal(response, 429)["code"] == "busy"
    assert int(response.headers["retry-after"]) > 0


def test_more_answers_than_may_ever_wait_are_refused_by_name(served):
    with running(Served("demo", Limits(waiting=2), engine=served.engine)) as url:
        error = refusal(httpx.post(url + CHAT, json=HELLO | {"n": 3}), 400)
        assert (error["param"], error["code"]) == ("n", "too_many")
        assert httpx.post(url + CHAT, json=HELLO | {"n": 2}, timeout=30).status_code == 200


def test_an_engine_that_closes_is_no_full_line(demo):
    engine = Engine(*demo)
    answering = Answering(engine, Limits(), False)
    served = Served("demo", engine=engine)
    engine.close()
    asked = Asked([{"role": "user", "content": "Hi"}], (), [Options()])
    with pytest.raises(ApiError) as refused:
        asyncio.run(answering.start(asked))
    assert (refused.value.status, refused.value.code) == (503, "closing")
    with running(served) as url:
        response = httpx.post(url + CHAT, json=HELLO)
        assert refusal(response, 503)["code"] == "closing"
        assert "retry-after" in response.headers


def test_the_first_request_may_come_while_the_engine_closes(demo):
    """It finds the engine open, which meanwhile lets go of what it had."""

    class Closing(Engine):
        @property
        def closing(self):
            self.close()
            return False

    served = Served("demo", engine=Closing(*demo))
    asked = Asked([{"role": "user", "content": "Hi"}], (), [Options()])
    with pytest.raises(ApiError) as refused:
        asyncio.run(served.ready("demo").start(asked))
    assert (refused.value.status, refused.value.code) == (503, "closing")


def test_requests_whose_pictures_are_being_read_are_counted_as_well(monkeypatch):
    engine = SimpleNamespace(waiting=0, processor=None)

    async def ask_at_once(count):
        answering = Answering(engine, Limits(rows=1, waiting=2), False)
        return await asyncio.gather(
            *(answering.count(Asked([], (), ())) for _ in range(count)), return_exceptions=True
        )

    inputs = SimpleNamespace(input_ids=np.zeros((1, 5)))
    monkeypatch.setattr(Answering, "_prepare", lambda *_: inputs)
    *read, refused = asyncio.run(ask_at_once(4))
    assert read == [5, 5, 5]
    assert refused.status == 429


def test_before_the_model_is_there_nothing_says_ready(demo):
    served = Served("demo")
    with running(served) as url:
        assert httpx.get(url + "/health").status_code == 503
        response = httpx.post(url + CHAT, json=HELLO)
        assert refusal(response, 503)["code"] == "loading"
        assert "retry-after" in response.headers


def test_a_model_that_cannot_be_loaded_ends_the_server(capsys):
    def load():
        raise UsageError("no such weights")

    ended = threading.Event()
    served = Served("demo", on_failure=ended.set)
    with running(served, load) as url:
        assert ended.wait(20)
        response = httpx.post(url + CHAT, json=HELLO)
        assert refusal(response, 500)["code"] == "failed"
        assert httpx.get(url + "/health").json() == {"status": "failed"}
    assert str(served.failure) == "no such weights"


def test_serve_says_why_it_cannot_load_and_ends(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llava_qwen2"}')
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "at http://127.0.0.1:" in said[0]
    assert len(said) == 2


@pytest.mark.parametrize(
    "flag", ["--max-rows", "--max-waiting", "--max-tokens", "--max-image-pixels"]
)
def test_limits_that_let_nothing_through_are_refused(flag, capsys):
    assert main(["serve", "--model", "demo", "--port", "0", flag, "0"]) == 2
    assert "must be above 0, not 0" in capsys.readouterr().err


def leave_early(url, body, when=None):
    """Send a request, and go away while it is answered, or at a certain moment."""
    content = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with connect(url) as connection:
        connection.sendall(head.encode() + content)
        if when is not None:
            when()
        elif body["stream"]:
            assert connection.recv(100)
        else:
            time.sleep(0.05)


def until(true):
    """Wait for something that is to happen in another thread."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_frees_its_place(endless, stream):
    body = {**HELLO, "max_tokens": 2000, "stream": stream}
    with running(Served("demo", engine=endless)) as url:
        leave_early(url, body)
        until(lambda: not endless.answering)
        assert httpx.post(url + CHAT, json=HELLO, timeout=30).status_code == 200


def test_clients_that_went_away_while_they_waited_keep_nobody_out(endless):
    inputs, arrived = endless.processor("Describe the image."), SimpleQueue()
    first = endless.submit(inputs, Options(max_tokens=2000), arrived.put)
    arrived.get()
    with running(Served("demo", Limits(rows=1, waiting=1), engine=endless)) as url:
        for _ in range(2):
            leave_early(url, {**HELLO, "stream": False}, lambda: until(lambda: endless.waiting))
            until(lambda: not endless.waiting)
        threading.Timer(0.2, first.cancel).start()
        assert httpx.post(url + CHAT, json=HELLO, timeout=30).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_while_it_is_prepared_is_not_queued(demo, monkeypatch, stream):
    """What is being read is read to its end, by the thread that has a place for that so long."""
    engine, submitted, began = Engine(*demo), [], threading.Event()
    submit, prepare, release = engine.submit, Answering._prepare, threading.Event()

    def slow(*args):
        began.set()
        release.wait(20)
        return prepare(*args)

    def counted(*args, **more):
        submitted.append(args)
        return submit(*args, **more)

    served, gone = Served("demo", engine=engine), threading.Event()
    monkeypatch.setattr(engine, "submit", counted)
    monkeypatch.setattr(Answering, "_prepare", slow)
    monkeypatch.setattr(served.metrics, "refused", lambda status: gone.set())
    with running(served) as url:
        leave_early(url, {**HELLO, "stream": stream}, began.wait)
        assert gone.wait(20)
        assert served.answering._under_way == 1
        release.set()
        until(lambda: not served.answering._under_way)
        assert httpx.post(url + CHAT, json=HELLO, timeout=30).status_code == 200
    assert len(submitted) == 1
    engine.close()


@pytest.mark.parametrize("fails", ["at the first event", "before it"])
def test_a_stream_that_fails_frees_its_place(endless, monkeypatch, fails):
    def failing(*_):
        while not endless.answering:
            time.sleep(0.01)
        raise OSError("it fails here")

    async def asked_for_events():
        body = json.dumps({**HELLO, "max_tokens": 4096, "stream": True}).encode()
        messages = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def send(message):
            if fails == "before it":
                failing()

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "path": CHAT,
            "method": "POST", "query_string": b"", "headers": [(b"host", b"localhost")],
        }  # fmt: skip
        with pytest.raises(OSError, match="it fails here"):
            await application(Served("demo", engine=endless))(scope, messages.get, send)
        deadline = time.monotonic() + 20  # while the loop runs: its end would free the place too
        while (endless.answering or endless.waiting) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert (endless.answering, endless.waiting) == (0, 0)

    if fails == "at the first event":
        monkeypatch.setattr(openai, "event", failing)
    asyncio.run(asked_for_events())


HALF = "\ud83d"  # of a surrogate pair, as JSON spells it


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/responses", {"input": "Hi", "user": HALF}, "user"),
    ("/v1/responses", {"input": "Hi", "instructions": f"a{HALF}"}, "instructions"),
    ("/v1/responses", {"input": "Hi", "metadata": {"a": HALF}}, "metadata.a"),
    ("/v1/responses", {"input": "Hi", "text": {"format": {
        "type": "json_schema", "name": HALF, "schema": {}}}}, "text.format.name"),
    ("/v1/responses", {"input": "Hi", "text": {"format": {
        "type": "json_schema", "schema": {"description": [HALF]}}}},
     "text.format.schema.description.0"),
    ("/v1/responses", {"input": "Hi", "text": {"format": {
        "type": "json_schema", "schema": {HALF: 1}}}}, "text.format.schema"),
    (CHAT, {"messages": [{"role": "user", "content": HALF}]}, "messages.0.content"),
    (CHAT, HELLO | {"stop": ["x", HALF]}, "stop.1"), (CHAT, HELLO | {HALF: 1}, None),
    ("/v1/completions", {"prompt": HALF}, "prompt"),
    ("/v1/messages", HELLO | {"metadata": {"user_id": HALF}}, "metadata.user_id"),
])  # fmt: skip
def test_a_text_that_no_answer_could_repeat_is_refused(client, path, body, param, stream):
    response = client.post(
        path, content=json.dumps(body | {"stream": stream}),
        headers={"content-type": "application/json"},
    )  # fmt: skip
    error = refusal(response, 400)
    assert "half of a surrogate pair" in error["message"]
    assert error.get("param") == (None if path == "/v1/messages" else param)


def test_a_whole_pair_is_a_character_and_raw_halves_are_none(client):
    headers = {"content-type": "application/json"}
    whole = b'{"input": "\\ud83d\\ude00", "user": "\xf0\x9f\x98\x80", "max_output_tokens": 2}'
    answer = client.post("/v1/responses", content=whole, headers=headers)
    assert answer.json()["user"] == "\U0001f600"
    raw = b'{"input": "Hi", "user": "\xed\xa0\xbd"}'
    assert refusal(client.post("/v1/responses", content=raw, headers=headers), 400)


def test_nesting_has_a_limit(client):
    def asked(levels):
        schema = {"type": "object", "default": json.loads("[" * levels + "]" * levels)}
        wanted = {"format": {"type": "json_schema", "schema": schema}}
        body = {"input": "Hi", "text": wanted, "max_output_tokens": 2}
        return client.post("/v1/responses", json=body)

    assert asked(100).status_code == 200
    assert "at most 200 levels" in refusal(asked(300), 400)["message"]


def test_values_have_a_limit_before_they_are_made(client, monkeypatch):
    """Python looks at each one, in the event loop that serves the others."""
    seen = []
    look = requests._check_echoed
    monkeypatch.setattr(
        requests, "_check_echoed", lambda value, *path: (seen.append(1), look(value, *path))
    )
    headers = {"content-type": "application/json"}
    many = b'{"x": [' + b"[]," * requests.MAX_VALUES + b"[]]}"
    error = refusal(client.post(CHAT, content=many, headers=headers), 400)
    assert (error["code"], seen) == ("too_many_values", [])
    assert "200,000 commas" in error["message"]
    few = b'{"messages": [' + b"[]," * 100 + b"[]]}"
    refusal(client.post(CHAT, content=few, headers=headers), 400)
    assert len(seen) == 104  # the lists, theirs, the body and its keys


def health(connection):
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    told = b""
    while not told.endswith(b"}"):
        told += connection.recv(10_000)
    return told


@pytest.mark.parametrize("most", [1, 2])
def test_as_many_connections_as_were_said_are_answered(served, most):
    with running(Served("demo", engine=served.engine), limit_concurrency=most) as url:
        admitted = [connect(url) for _ in range(most)]
        for connection in admitted:
            assert b"200 OK" in health(connection)
        with connect(url) as more:
            told = health(more)
            assert b"200 OK" in health(admitted[0])  # it keeps its place
            assert more.recv(100) == b""
        head, _, body = told.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 2" in head
        assert b"x-content-type-options" in head
        assert json.loads(body)["error"]["message"].startswith("too many connections are open")
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            httpx.post(f"{url}/v1/messages", json=HELLO).raise_for_status()
        admitted.pop().close()
        deadline = time.monotonic() + 20
        while httpx.get(f"{url}/health").status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert httpx.get(f"{url}/health").status_code == 200
        for connection in admitted:
            connection.close()


def test_too_many_connections_are_told_in_each_api_s_form_and_to_named_pages(served):
    page = "https://page.example"
    open_to = Served("demo", access=Access(origins=(page,)), engine=served.engine)
    with running(open_to, limit_concurrency=1) as url, connect(url):
        response = httpx.post(f"{url}/v1/messages", json=HELLO, headers={"origin": page})
        assert response.json()["type"] == "error"
        assert response.headers["access-control-allow-origin"] == page
        assert refusal(httpx.post(url + CHAT, json=HELLO), 503)["code"] == "busy"


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_slow_clients_are_cut_off(served, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with running(Served("demo", Limits(body_seconds=0.2), engine=served.engine)) as url:
        silent, dripping, slow = connect(url), connect(url), connect(url)
        dripping.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")  # fmt: skip
        assert silent.recv(100) == b""
        assert dripping.recv(100) == b""
        assert b"408" in slow.recv(1000)
        for connection in (silent, dripping, slow):
            connection.close()


def test_a_later_request_and_one_that_was_refused_have_no_longer(served, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    guarded = Served("demo", access=Access(key="sesame"), engine=served.engine)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    with running(guarded, timeout_keep_alive=1) as url:
        second = connect(url)
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nG")  # and no more
        refused = connect(url)
        refused.sendall(head)
        assert b"401" in refused.recv(10_000)
        refused.sendall(b"x")  # and no more of its 9,999
        for connection in (second, refused):
            while connection.recv(10_000):
                pass
            connection.close()


def test_a_client_that_takes_nothing_is_cut_off(served, monkeypatch):
    monkeypatch.setattr(connections, "STUCK_SECONDS", 0.2)
    lost = threading.Event()
    own = connections.Protocol.connection_lost
    monkeypatch.setattr(
        connections.Protocol, "connection_lost", lambda *args: (own(*args), lost.set())
    )
    served = Served("demo", Limits(send_seconds=0.1), engine=served.engine)
    with running(served) as url, connect(url) as greedy:
        greedy.setblocking(False)
        with pytest.raises(BlockingIOError):
            ask_for_ever(greedy)
        assert lost.wait(20)


def ask_for_ever(connection):
    while True:
        connection.send(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)


def test_no_prompt_reaches_the_logs(client, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        client.post(CHAT, json={"messages": [{"role": "user", "content": "sesame"}], **HELLO})
        client.post(CHAT, json={"messages": [{"role": "user", "content": "sesame"}], "n": 0})
    out, err = capfd.readouterr()
    assert "sesame" not in out + err
    assert not [r for r in caplog.records if r.name.startswith("mlx") and "sesame" in r.message]


@pytest.mark.parametrize("addresses", [
    ["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["192.168.0.1"], ["::1"], ["fe80::1"],
    ["::ffff:127.0.0.1"], ["0.0.0.0"], ["224.0.0.1"], ["100.64.0.1"],
    ["64:ff9b::a00:1"], ["::7f00:1"], ["fec0::1"], ["8.8.8.8", "127.0.0.1"], [],
])  # fmt: skip
def test_only_public_addresses_are_connected_to(addresses, monkeypatch):
    entries = [(None, None, None, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(ValueError, match="public"):
        remote.public_address("name.example", 443)


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    looked_up, connected = [], []

    def lookup(host, port, **_):
        looked_up.append(host)
        return [(None, None, None, "", ("8.8.8.8" if len(looked_up) == 1 else "127.0.0.1", port))]

    def connect_to(address, timeout):
        connected.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(remote.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(remote.socket, "create_connection", connect_to)
    with pytest.raises(ApiError, match="cannot be fetched"):
        remote.download("https://name.example/x.png", "field", Limits())
    assert looked_up == ["name.example"]
    assert connected == [("8.8.8.8", 443)]


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_certificates_are_checked_where_python_came_without_authorities(
    tmp_path, monkeypatch, folder
):
    """As python.org's for macOS does."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / folder))
    assert ssl.create_default_context().cert_store_stats()["x509_ca"] == 0
    allowance = fetch.Allowance("x", 15.0, 2**20)
    monkeypatch.setattr(fetch._Http, "do_open", lambda *_, context: context)
    own = fetch._Http(allowance).https_open(None)
    for context in (own, remote._Connection("host", 443, allowance)._context):
        assert context.cert_store_stats()["x509_ca"] > 50
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_authorities_that_someone_chose_are_the_only_ones(tmp_path, monkeypatch):
    """A folder of them is read when a server's certificate is checked."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    (tmp_path / "5ed36f99.0").touch()
    assert fetch.trusting().cert_store_stats()["x509_ca"] == 0


PINNED = """\
-----BEGIN CERTIFICATE-----
MIIBhzCCASygAwIBAgIUHOMhSz8YMtwnXU3/eLj608y4/2owCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOcGlubmVkLmV4YW1wbGUwIBcNMjYxMTI3MTIyODQ4WhgPMjEy
NjExMDMxMjI4NDhaMBkxFzAVBgNVBAMMDnBpbm5lZC5leGFtcGxlMFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAE47SeCQKHvHf7A0uMpApQlbWQ7r41YNiZ+tacY1TW
SIIpI218eP/ILymImMVQBUzIKJ6ioAF5mgzAkZBEGCNb4qNQME4wHQYDVR0OBBYE
FEv8XnDLZSx4/xsCxBKuNvosrOSiMB8GA1UdIwQYMBaAFEv8XnDLZSx4/xsCxBKu
NvosrOSiMAwGA1UdEwEB/wQCMAAwCgYIKoZIzj0EAwIDSQAwRgIhAIQXgmc55nxr
BQrsreSwl470YK4jff5zMyjXBzAOkWsaAiEA5s3G+q9X/tSImFUXsyYpjGaYAyrN
b3tQAAnhWcgtH7U=
-----END CERTIFICATE-----
"""  # pinned.example's own, CA:FALSE


@pytest.mark.parametrize("certificate", [PINNED, None])
def test_a_server_s_own_certificate_is_chosen_and_a_file_of_macos_is_not(
    tmp_path, monkeypatch, certificate
):
    (tmp_path / ".DS_Store").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pinned.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    if certificate:
        (tmp_path / "pinned.pem").write_text(certificate)
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "nowhere"))
        assert fetch.trusting().cert_store_stats() == {"crl": 0, "x509": 1, "x509_ca": 0}
    else:
        assert fetch.trusting().cert_store_stats()["x509_ca"] > 50


@pytest.mark.parametrize("url", [
    "http://name.example/x", "https://u:p@name.example/x", "https:///x", "https://[x/", "x",
    "https://name.example:99999/", "file:///x",
])  # fmt: skip
def test_only_plain_https_is_fetched(url, monkeypatch):
    monkeypatch.setattr(remote.socket, "create_connection", None)
    with pytest.raises(ApiError, match="cannot be fetched"):
        remote.download(url, "field", Limits())


class Answer:
    """An HTTP answer of a test's."""

    def __init__(self, status=200, content=b"", location=""):
        self.status, self.headers = status, {"Location": location}
        self.read, self.length = io.BytesIO(content).read, len(content)


@pytest.fixture
def web(monkeypatch):
    """Answers by address in place of connections; the addresses asked for."""
    answers, asked = {}, []

    class Connection:
        def __init__(self, host, port, allowance):
            self.host = host
            remote.public_address(host, port)

        def request(self, method, path, headers):
            asked.append(f"https://{self.host}{path}")

        def getresponse(self):
            return answers[asked[-1]]

        def close(self):
            pass

    def lookup(host, port, **_):
        return [(None, None, None, "", ("127.0.0.1" if host == "inside" else "8.8.8.8", port))]

    monkeypatch.setattr(remote, "_Connection", Connection)
    monkeypatch.setattr(remote, "socket", SimpleNamespace(getaddrinfo=lookup, SOCK_STREAM=1))
    return answers, asked


def test_redirects_are_followed_and_each_is_checked_again(web):
    answers, asked = web
    answers["https://a/x"] = Answer(302, location="https://b/y")
    answers["https://b/y"] = Answer(200, b"picture")
    assert remote.download("https://a/x", "field", Limits()) == b"picture"
    assert asked == ["https://a/x", "https://b/y"]
    for location in ("https://inside/y", "http://b/y", "https://a/x"):
        answers["https://a/x"] = Answer(302, location=location)
        with pytest.raises(ApiError, match="cannot be fetched"):
            remote.download("https://a/x", "field", Limits())
    assert "https://inside/y" not in asked


def test_a_remote_picture_has_a_size_limit(web):
    web[0]["https://a/x"] = Answer(200, b"x" * 1001)
    with pytest.raises(ApiError, match="cannot be fetched"):
        remote.download("https://a/x", "field", Limits(body_bytes=1000))


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_drips_does_not_outlast_the_time_of_a_picture(sent, monkeypatch):
    near, far = socket.socketpair()
    monkeypatch.setattr(remote._Connection, "connect", lambda self: setattr(self, "sock", near))
    now = iter(range(10_000))  # each look at the clock is a second later than the one before
    # Of this module alone: a server's loop that runs beside would sleep until the clock is back.
    monkeypatch.setattr(fetch, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    with far:
        far.sendall(sent + b"x" * 60_000)
        connection = remote._Connection("host", 443, fetch.Allowance("x", 15.0, 2**20))
        monkeypatch.setattr(fetch._Bytes, "readinto", one_byte(fetch._Bytes.readinto))
        monkeypatch.setattr(remote, "_Connection", lambda *_: connection)
        with pytest.raises(ApiError, match="cannot be fetched"):
            remote.download("https://host/x", "field", Limits())
        assert next(now) < 40


def one_byte(readinto):
    """A read that gives a byte at a time, as a server that drips."""
    return lambda self, buffer: readinto(self, memoryview(buffer)[:1])


def test_remote_pictures_work_where_they_are_allowed(served, web):
    web[0]["https://pictures/x.png"] = Answer(200, base64.b64decode(data_url().split(",")[1]))
    with running(Served("demo", remote_images=True, engine=served.engine)) as url:
        asked = {"messages": [question("Describe the image.", "https://pictures/x.png")]}
        assert httpx.post(url + CHAT, json=asked, timeout=30).status_code == 200


def test_the_names_of_this_machine():
    assert set(LOCAL_NAMES) == {"localhost", "127.0.0.1", "[::1]"}


def test_the_page_allows_nothing_from_elsewhere(client):
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    for path in ("/", "/page.js", "/page.css"):
        text = client.get(path).text
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
    assert "<script>" not in client.get("/").text
