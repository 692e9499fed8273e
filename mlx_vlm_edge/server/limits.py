"""What a server takes at most; every limit is a setting of `mlx-vlm-edge serve`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. images: in a request. image_pixels: of one picture, by its header.

    tokens: that one answer may have. waiting: requests in the queue beside those being answered.
    rows: requests answered together. connections: open at once. body_seconds: for a request to
    arrive in. send_seconds: for a client to take a piece. image_seconds: for a remote picture.
    cache: options of every request's KV cache, prefill and drafts, as `generate` takes them.
    Raises UsageError for one that lets nothing through; images may be 0.
    """

    body_bytes: int = 32 * 2**20
    images: int = 16
    image_pixels: int = 50_000_000
    tokens: int = 4096
    waiting: int = 32
    rows: int = 8
    connections: int = 256
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    image_seconds: float = 15.0
    cache: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if limit.name == "cache":  # checked where it is read
                continue
            if value < 0 or (value == 0 and limit.name != "images"):
                raise UsageError(f"{limit.name} of a server must be above 0, not {value}")
