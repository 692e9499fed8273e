"""What can be told of a prompt's pictures before a model is looked for: nothing is decoded here."""

from dataclasses import replace
from typing import Any

from ..errors import UsageError
from .image import check_header, shown
from .pdf import Page
from .video import Video, existing


class Fetched(bytes):
    """The bytes behind an address, which stands for them where they are saved."""

    address: str

    def __new__(cls, content: bytes, address: str) -> "Fetched":
        fetched = super().__new__(cls, content)
        fetched.address = address
        return fetched


def is_remote(source: Any) -> bool:
    """Whether a picture has to be fetched from another machine."""
    address = source.source if isinstance(source, Page) else source
    return isinstance(address, str) and address.lower().startswith(("http://", "https://"))


def refuse_remote(source: Any) -> None:
    """Raises UsageError for a picture that has to be fetched: no network was asked for."""
    if is_remote(source):
        address = source.source if isinstance(source, Page) else source
        raise UsageError(
            f"{shown(str(address))}: nothing is fetched offline: save the picture, name its file"
        )


def checked(source: Any, offline: bool = False) -> Any:
    """A path, an address, bytes, a page or a video -> the same, an http(s) address's bytes.

    Raises UsageError for what is not there, is no picture by its header, or is too large.
    """
    if isinstance(source, Video):
        existing(source)
        return source
    if is_remote(source):
        if offline:
            refuse_remote(source)
        from .fetch import download

        page, address = isinstance(source, Page), getattr(source, "source", source)
        content = Fetched(download(address, shown(address)), address)
        source = replace(source, source=content) if page else content
    check_header(source)
    return source
