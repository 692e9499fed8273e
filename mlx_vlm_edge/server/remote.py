"""An https address of a client's -> bytes, without letting the client reach what only we can.

The name is looked up once; every address it has must be a public one, and the connection goes to
the very address that was checked. A redirect starts over, with what is left of the time.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

from .errors import bad_request
from .limits import Limits

MAX_REDIRECTS = 3
CHUNK = 64 * 2**10
REDIRECTS = (301, 302, 303, 307, 308)


def download(url: str, field: str, limits: Limits) -> bytes:
    """The bytes behind an https URL. Raises ApiError 400 in the same words for whatever fails."""
    deadline = time.monotonic() + limits.image_seconds
    try:
        for _ in range(MAX_REDIRECTS + 1):
            content, url = _get(url, deadline, limits.body_bytes)
            if content is not None:
                return content
    except (OSError, ValueError, http.client.HTTPException, UnicodeError):
        pass
    raise bad_request(f"{field}: the image cannot be fetched", field, "invalid_image")


def _get(url: str, deadline: float, limit: int) -> tuple[bytes | None, str]:
    """Content, or None and where a redirect leads. Raises OSError or ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
        raise ValueError("not a plain https address")
    connection = _Connection(parts.hostname, parts.port or 443, deadline)
    try:
        connection.request("GET", parts._replace(scheme="", netloc="").geturl() or "/", headers={
            "Accept": "image/*", "User-Agent": "mlx-vlm-edge",
        })  # fmt: skip
        answer = connection.getresponse()
        if answer.status in REDIRECTS:
            return None, urljoin(url, answer.headers.get("Location", ""))
        if answer.status != 200:
            raise ValueError("not found")
        return _body(answer, connection, limit), url
    finally:
        connection.close()


def _body(answer: http.client.HTTPResponse, connection: "_Connection", limit: int) -> bytes:
    content = bytearray()
    while piece := answer.read1(CHUNK):
        content += piece
        if len(content) > limit:
            raise ValueError("too large")
        connection.check_time()
    return bytes(content)


class _Connection(http.client.HTTPSConnection):
    """To one checked address, under the host's own name; every wait ends at the deadline."""

    def __init__(self, host: str, port: int, deadline: float) -> None:
        super().__init__(host, port, context=ssl.create_default_context())
        self.deadline = deadline

    def check_time(self) -> None:
        """Give the next wait what is left. Raises TimeoutError when nothing is."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self.sock is not None:
            self.sock.settimeout(left)

    def connect(self) -> None:
        address = public_address(self.host, self.port)
        left = max(self.deadline - time.monotonic(), 0.001)
        plain = socket.create_connection(address, timeout=left)
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)  # type: ignore[attr-defined]
        self.check_time()


def public_address(host: str, port: int) -> tuple[str, int]:
    """The address to connect to. Raises ValueError when any of the host's is not a public one."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in entries]
    if not addresses or not all(_public(address) for address in addresses):
        raise ValueError("not a public address")
    return str(addresses[0]), port


def _public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return (address if inner is None else inner).is_global and not address.is_multicast
