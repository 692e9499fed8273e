"""A request's image addresses -> picture files' bytes, each checked by its header before decoding.

data: URLs always; https where the operator allows it. Whatever else an address is, the answer is
the same, so that nobody learns which files or hosts exist.
"""

from collections.abc import Sequence

from ..errors import UsageError
from ..picture.fetch import read_data_uri
from .errors import ApiError, bad_request
from .limits import Limits
from .remote import download

REFUSED = "an image must be a data: URL (data:image/png;base64,...)"


def read(
    addresses: Sequence[tuple[str, str]], prompt: str, limits: Limits, remote: bool
) -> list[bytes]:
    """The bytes behind each (field, address), in order; blocks, so not for the event loop.

    Raises ApiError that names the field for an address that is not taken and a picture of more
    pixels than allowed, and `prompt`, the field that holds them all, for too many pictures.
    """
    if len(addresses) > limits.images:
        raise bad_request(f"at most {limits.images} images are taken", prompt, "too_many")
    return [_read(address, field, limits, remote) for field, address in addresses]


def _read(address: str, field: str, limits: Limits, remote: bool) -> bytes:
    if address[:5].lower() == "data:":
        try:
            content = read_data_uri(address)
        except UsageError as error:
            raise bad_request(f"{field}: {error}", field, "invalid_image") from None
    elif remote and address[:6].lower() == "https:":
        content = download(address, field, limits)
    else:
        more = " or an https address" if remote else ""
        raise bad_request(f"{field}: {REFUSED}{more}", field, "invalid_image")
    check_header(content, field, limits)
    return content


def check_header(content: bytes, field: str, limits: Limits) -> None:
    """Raises ApiError unless the bytes begin as a picture of few enough pixels."""
    from ..picture.image import header

    if not content:
        raise bad_request(f"{field}: the image is empty", field, "invalid_image")
    if content.startswith(b"%PDF-"):
        raise bad_request(
            f"{field}: PDFs are not taken: send the page as a picture", field, "invalid_image"
        )
    try:
        with header(content, content[:12], "the image") as image:
            width, height = image.size
    except UsageError as error:
        raise bad_request(f"{field}: {error}", field, "invalid_image") from None
    if width * height > limits.image_pixels:
        raise ApiError(
            413,
            f"{field}: {width:,} x {height:,} pixels are more than {limits.image_pixels:,}",
            param=field,
            code="image_too_large",
        )
