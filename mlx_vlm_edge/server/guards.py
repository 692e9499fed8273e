"""What every request passes before it is looked at: host, origin, key, size and time.

Pure ASGI, in front of the application. A browser page of another origin cannot use the server
unless its origin was named, nor can a name that was made to point here (DNS rebinding).
"""

import asyncio
import hmac
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_SECONDS, ApiError
from .limits import Limits

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
PREFLIGHT = "GET, POST, OPTIONS"
OWN_HEADERS = "authorization, content-type, x-api-key"
# What a page's script means to send: OpenAI's and Anthropic's clients have a dozen of their own.
HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(, ?[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
MAX_HEADER_NAMES = 2048  # characters of them
FULL = "mlx_vlm_edge.full"  # true in the scope of a connection beyond as many as may be open


@dataclass(frozen=True)
class Access:
    """hosts: names this server answers to, without ports; origins: other pages that may use it.

    key: what clients must send, None for no key.
    """

    hosts: Collection[str] = LOCAL_NAMES
    origins: Collection[str] = ()
    key: str | None = None

    def check(self, headers: Headers, open_to_all: bool) -> None:
        """Raises ApiError for a request that is not to be answered. open_to_all: needs no key."""
        host = headers.get("host", "")
        if _name(host) not in self.hosts:
            raise ApiError(421, "this server does not answer under that host name", code="host")
        origin = headers.get("origin")
        if origin is not None and not self.same_origin(origin, host) and origin not in self.origins:
            raise ApiError(403, "pages of other origins may not use this server", code="origin")
        if not open_to_all and not self._has_key(headers):
            wrong = "authorization" in headers or "x-api-key" in headers
            told = "the API key is not this server's" if wrong else "an API key is needed"
            raise ApiError(401, f"{told}: Authorization: Bearer KEY", code="api_key")

    @staticmethod
    def same_origin(origin: str, host: str) -> bool:
        return origin in (f"http://{host}", f"https://{host}")

    def _has_key(self, headers: Headers) -> bool:
        if self.key is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(sent.encode(), self.key.encode())

    def cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Response headers for a page of a named origin; none for any other."""
        origin = headers.get("origin")
        if origin is None or origin not in self.origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", PREFLIGHT.encode()),
            (b"access-control-allow-headers", _header_names(headers).encode()),
            (b"access-control-expose-headers", b"Retry-After"),
            (b"vary", b"Origin"),
        ]


def _header_names(headers: Headers) -> str:
    """Request headers that a page of a named origin may send: all that it asks for."""
    asked = headers.get("access-control-request-headers", "")
    plain = len(asked) <= MAX_HEADER_NAMES and HEADER_NAMES.fullmatch(asked)
    return asked if plain else OWN_HEADERS


def _name(host: str) -> str:
    """A Host header without its port: "[::1]:8080" -> "[::1]"."""
    host = host.lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


class Guards:
    """ASGI middleware: `Access`, then limits on the body's size and on how long it takes.

    open_paths: answered without a key, since those who ask for them cannot have one yet.
    """

    def __init__(
        self, app: ASGIApp, access: Access, limits: Limits, open_paths: Collection[str] = ()
    ) -> None:
        self.app, self.access, self.limits, self.open_paths = app, access, limits, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        cors = self.access.cors(headers)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *cors, *SECURITY]
            async with asyncio.timeout(self.limits.send_seconds):
                await send(message)

        try:
            preflight = scope["method"] == "OPTIONS" and "origin" in headers
            self.access.check(headers, preflight or scope["path"] in self.open_paths)
            if preflight:
                await _respond(answer, 204, b"", {})
                return
            if scope.get(FULL):
                raise ApiError(
                    503, "too many connections are open: try again later", code="busy",
                    retry_after=RETRY_SECONDS, close=True,
                )  # fmt: skip
            body = await self._body(headers, receive)
            await self.app(scope, _Replayed(body, receive), answer)
        except ApiError as error:
            await respond_error(answer, error, scope["path"])
        except TimeoutError:
            return  # a client that takes nothing: the connection is closed on it

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body. Raises ApiError 413 for too much of it and 408 for too slow."""
        length = headers.get("content-length", "0")
        too_large = ApiError(
            413, f"a request may have {self.limits.body_bytes:,} bytes", code="body_too_large"
        )
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the request broke off")
                    body += message.get("body", b"")
                    if len(body) > self.limits.body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive", code="timeout") from None


class _Replayed:
    """`receive` that gives a body that was read already, then whatever comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


async def respond_error(send: Send, error: ApiError, path: str) -> None:
    """Answer with an error, in front of the application."""
    await _respond(send, error.status, json.dumps(error.form(path)).encode(), error.headers)


async def _respond(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    listed: list[Any] = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    listed.append((b"content-length", str(len(body)).encode()))
    if body:
        listed.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": body})
