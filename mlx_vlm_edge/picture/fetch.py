"""A web address or data: URI -> bytes, with limits on size, time and redirects."""

import base64
import binascii
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any

from ..errors import UsageError

MAX_DOWNLOAD = 64 * 2**20  # bytes
MAX_REDIRECTS = 5
SOCKET_TIMEOUT = 15  # seconds without a byte
DOWNLOAD_TIMEOUT = 60  # seconds in all


def fetch(address: str, name: str) -> bytes:
    """The bytes behind an http(s) URL or in a data: URI; the mime type is not looked at.

    name: how errors call it. Raises UsageError for another scheme, an answer other than 200, a
    limit passed, or bad base64.
    """
    return read_data_uri(address) if address[:5].lower() == "data:" else download(address, name)


def read_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if len(body) > MAX_DOWNLOAD * 4 // 3 + 4:
        raise UsageError(f"the data: URI is larger than {MAX_DOWNLOAD // 2**20} MB")
    content = urllib.parse.unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        if not comma:
            raise UsageError("the data: URI has no comma: data:image/png;base64,...")
        return content
    try:
        packed = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("the data: URI is not valid base64") from None


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
        raise UsageError(f"{name}: only http and https addresses are fetched")


def download(url: str, name: str) -> bytes:
    try:
        _check_scheme(url, name)
        request = urllib.request.Request(url, headers={"User-Agent": "mlx-vlm-edge"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=SOCKET_TIMEOUT) as reply:
            return _read_capped(reply, name)
    except urllib.error.HTTPError as error:
        reason = error.reason.splitlines()[0] if error.reason else ""
        raise UsageError(f"{name}: the server answered {error.code} {reason}") from None
    except urllib.error.URLError as error:
        raise UsageError(f"{name}: cannot be fetched: {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name}: cannot be fetched: {reason}") from None


def _read_capped(reply: IO[bytes], name: str) -> bytes:
    """The body, up to MAX_DOWNLOAD bytes and DOWNLOAD_TIMEOUT seconds."""
    end, parts, size = time.monotonic() + DOWNLOAD_TIMEOUT, [], 0
    while part := reply.read(2**16):
        parts.append(part)
        size += len(part)
        if size > MAX_DOWNLOAD:
            raise UsageError(f"{name}: is larger than {MAX_DOWNLOAD // 2**20} MB")
        if time.monotonic() > end:
            raise UsageError(f"{name}: took longer than {DOWNLOAD_TIMEOUT} s to fetch")
    return b"".join(parts)
