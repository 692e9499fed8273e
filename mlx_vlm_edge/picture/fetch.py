"""A web address, file: address or data: URI -> bytes, with limits on size, time and redirects."""

import base64
import binascii
import http.client
import io
import os
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..errors import UsageError
from ..system_files import of_the_system

MAX_DOWNLOAD = 64 * 2**20  # bytes
MAX_ADDRESS = 1 << 14  # characters
MAX_REDIRECTS = 5
SOCKET_TIMEOUT = 15  # seconds without a byte
DOWNLOAD_TIMEOUT = 60  # seconds in all: redirects, headers and body
# What stands for itself in an address; everything else is percent-encoded as UTF-8.
_PLAIN = "!#$%&'()*+,/:;=?@[]~"


def fetch(address: str, name: str) -> bytes | Path:
    """The bytes behind an http(s) URL or in a data: URI; the mime type is not looked at. The path
    of a file: URL.

    name: how errors call it. Raises UsageError for another scheme, an answer other than 200, a
    limit passed, or bad base64.
    """
    if address[:5].lower() == "data:":
        return read_data_uri(address)
    if address[:7].lower() == "file://":
        return _local(address, name)
    return download(address, name)


def _local(address: str, name: str) -> Path:
    host, slash, path = address[7:].partition("/")
    if host.lower() not in ("", "localhost"):
        raise UsageError(f"{name}: a file on another machine; file:///path names one here")
    return Path(urllib.request.url2pathname(slash + path))


def read_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if len(body) > MAX_DOWNLOAD * 4 // 3 + 4:
        raise UsageError(f"the data: URI is larger than {MAX_DOWNLOAD // 2**20} MB")
    try:
        content = urllib.parse.unquote_to_bytes(body)
    except UnicodeEncodeError:
        raise UsageError("the data: URI is not valid Unicode text") from None
    if not header.lower().endswith(";base64"):
        if not comma:
            raise UsageError("the data: URI has no comma: data:image/png;base64,...")
        return content
    try:
        packed = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("the data: URI is not valid base64") from None


class Allowance:
    """What one download may still take: seconds, and bytes of all its answers, headers included."""

    def __init__(self, name: str, seconds: float, size: int) -> None:
        self.name, self.seconds, self.size = name, seconds, size
        self.end, self.left = time.monotonic() + seconds, size

    def wait(self) -> float:
        """Seconds that the next step may take."""
        if (left := self.end - time.monotonic()) <= 0:
            raise self.late()
        return min(left, SOCKET_TIMEOUT)

    def late(self) -> UsageError:
        return UsageError(f"{self.name}: took longer than {self.seconds} s to fetch")

    def count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise UsageError(f"{self.name}: is larger than {self.size // 2**20} MB")


class _Bytes(io.RawIOBase):
    """What a server sends, within limits: every read of status, headers, chunks and body."""

    def __init__(self, sock: socket.socket, limits: Allowance) -> None:
        self._sock, self._limits = sock, limits
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        seconds = self._limits.wait()
        self._sock.settimeout(seconds)
        try:
            size = self._file.readinto(buffer)
        except TimeoutError:
            if seconds < SOCKET_TIMEOUT:
                raise self._limits.late() from None
            raise
        self._limits.count(size or 0)
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """An answer of which status, headers and body are read within an allowance."""

    def __init__(self, limits: Allowance, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Bytes(sock, limits))


def _connection(kind: Callable[..., Any], limits: Allowance, *args: Any, **kwargs: Any) -> Any:
    """An http(s) connection whose addresses are tried, and whose answers are read, in `limits`."""
    connection = kind(*args, **kwargs)
    connection.response_class = partial(Answer, limits)
    connection._create_connection = partial(_connect, limits)
    return connection


def _connect(
    limits: Allowance, address: tuple[str, int], timeout: float, source: Any = None
) -> socket.socket:
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(limits.wait())
            sock.connect(place)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure


def trusting() -> ssl.SSLContext:
    """What checks https: the certificates that OpenSSL finds or, where there are none, certifi's.

    python.org's Python for macOS comes without any.
    """
    context = ssl.create_default_context()
    folder = ssl.get_default_verify_paths().capath  # of which one is read when it is needed
    chosen = folder and any(not of_the_system(name) for name in os.listdir(folder))
    if not chosen and not context.cert_store_stats()["x509"]:  # a server's own is no authority's
        import certifi

        context.load_verify_locations(certifi.where())
    return context


class _Http(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, limits: Allowance) -> None:
        urllib.request.HTTPSHandler.__init__(self)
        self._limits = limits

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_connection, http.client.HTTPConnection, self._limits), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        kind = partial(_connection, http.client.HTTPSConnection, self._limits)
        return self.do_open(kind, req, context=trusting())


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_scheme(newurl, newurl[:80])
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str, name: str) -> None:
    if urllib.parse.urlsplit(url).scheme.lower() not in ("http", "https"):
        raise UsageError(f"{name}: only http, https and file addresses are read")


def download(url: str, name: str) -> bytes:
    """The body behind an http(s) URL. Raises UsageError as `fetch` does."""
    if len(url) > MAX_ADDRESS:
        raise UsageError(f"{name}: an address of {len(url):,} characters; give a shorter one")
    limits = Allowance(name, DOWNLOAD_TIMEOUT, MAX_DOWNLOAD)
    try:
        _check_scheme(url, name)
        request = urllib.request.Request(ascii_url(url), headers={"User-Agent": "mlx-vlm-edge"})
        opener = urllib.request.build_opener(_Redirects, _Http(limits))
        with opener.open(request, timeout=limits.wait()) as reply:
            return read_body(reply, limits)
    except urllib.error.HTTPError as error:
        reason = error.reason.splitlines()[0] if error.reason else ""
        raise UsageError(f"{name}: the server answered {error.code} {_plain(reason)}") from None
    except urllib.error.URLError as error:
        raise UsageError(f"{name}: cannot be fetched: {_plain(error.reason)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = _plain(error) or type(error).__name__
        raise UsageError(f"{name}: cannot be fetched: {reason}") from None


def _plain(reason: Any) -> str:
    """One printable line of what a server or the system said."""
    return "".join(x if x.isprintable() else "?" for x in " ".join(str(reason).split()))[:200]


def ascii_url(url: str) -> str:
    """An address as it is sent: the host in IDNA, the rest percent-encoded where it must be.

    "http://bücher.example/ä b.png" -> "http://xn--bcher-kva.example/%C3%A4%20b.png"
    """
    parts = urllib.parse.urlsplit(url.strip())
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    rest = urllib.parse.urlunsplit(parts._replace(netloc="host"))
    start = rest.index("host") + len("host")
    return f"{parts.scheme}://{host}{urllib.parse.quote(rest[start:], safe=_PLAIN)}"


def read_body(reply: Any, limits: Allowance) -> bytes:
    """A whole body, refused by its announced length where that is too much."""
    limits.count(max(reply.length or 0, 0))  # announced: refused before it is read
    limits.left += max(reply.length or 0, 0)
    parts = iter(partial(reply.read, 2**16), b"")
    return b"".join(parts)
