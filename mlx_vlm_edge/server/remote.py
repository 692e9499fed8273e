"""An https address of a client's -> bytes, without letting the client reach what only we can.

The name is looked up once; every address it has must be a public one, and the connection goes to
the very address that was checked. A redirect starts over, with what is left of the time.
"""

import http.client
import ipaddress
import socket
from functools import partial
from urllib.parse import urljoin, urlsplit

from ..errors import UsageError
from ..picture.fetch import Allowance, Answer, read_body, trusting
from .errors import bad_request
from .limits import Limits

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is assigned to the public


def download(url: str, field: str, limits: Limits) -> bytes:
    """The bytes behind an https URL. Raises ApiError 400 in the same words for whatever fails."""
    allowance = Allowance(field, limits.image_seconds, limits.body_bytes)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            content, url = _get(url, allowance)
            if content is not None:
                return content
    except (OSError, ValueError, http.client.HTTPException, UsageError):
        pass
    raise bad_request(f"{field}: the image cannot be fetched", field, "invalid_image")


def _get(url: str, allowance: Allowance) -> tuple[bytes | None, str]:
    """Content, or None and where a redirect leads. Raises OSError, ValueError or UsageError."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
        raise ValueError("not a plain https address")
    connection = _Connection(parts.hostname, parts.port or 443, allowance)
    try:
        connection.request("GET", parts._replace(scheme="", netloc="").geturl() or "/", headers={
            "Accept": "image/*", "User-Agent": "mlx-vlm-edge",
        })  # fmt: skip
        answer = connection.getresponse()
        if answer.status in REDIRECTS:
            return None, urljoin(url, answer.headers.get("Location", ""))
        if answer.status != 200:
            raise ValueError("not found")
        return read_body(answer, allowance), url
    finally:
        connection.close()


class _Connection(http.client.HTTPSConnection):
    """To one checked address, under the host's own name; every read is within the allowance."""

    def __init__(self, host: str, port: int, allowance: Allowance) -> None:
        super().__init__(host, port, context=trusting())
        self.allowance = allowance
        self.response_class = partial(Answer, allowance)  # type: ignore[assignment]

    def connect(self) -> None:
        address = public_address(self.host, self.port)
        plain = socket.create_connection(address, timeout=self.allowance.wait())
        self.sock = self._context.wrap_socket(plain, server_hostname=self.host)  # type: ignore[attr-defined]
        self.sock.settimeout(self.allowance.wait())


def public_address(host: str, port: int) -> tuple[str, int]:
    """The address to connect to. Raises ValueError when any of the host's is not a public one."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in entries]
    if not addresses or not all(_public(address) for address in addresses):
        raise ValueError("not a public address")
    return str(addresses[0]), port


def _public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:  # a network translates it to the IPv4 address in it
            return _public(ipaddress.IPv4Address(address.packed[-4:]))
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return _public(inner)
        if address not in UNICAST:
            return False
    return address.is_global and not address.is_multicast
