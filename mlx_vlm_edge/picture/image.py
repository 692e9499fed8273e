"""A picture from anywhere -> an upright RGB image in 8 bits, on the device where that is a GPU.

Pillow is imported at first use. Sizes are (width, height), arrays are (H, W, 3).
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UsageError
from ..kernels import pictures_on_device
from ..paths import expand
from ..wording import first_line
from . import jpeg
from .geometry import Color as Color
from .geometry import Strategy as Strategy
from .pdf import Page, page_image
from .resize import DRAFTED, Levels, Picture
from .resize import fit as fit
from .rgb import DAMAGED, to_rgb, upright, upright_size
from .token_budget import Reduction

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's own hard limit (two times its MAX_IMAGE_PIXELS): 13,377 x 13,377, or 0.7 GB as Pillow
# holds it, and as much again where it has to be converted to RGB or turned. Both limits are
# checked on the header, before anything is decoded.
MAX_PIXELS = 178_956_970
MAX_SIDE = 1 << 20  # pixels; Pillow's table of weights for a longer side would fill the memory
SHOWN = 80  # characters of a source's name in an error
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# What is read. Pillow knows more, such as EPS, for which it would start Ghostscript on the file's
# program. The first are there at once, the others when Pillow imports all it has.
COMMON = ("PNG", "JPEG", "GIF", "BMP", "PPM")
FORMATS = ("WEBP", "TIFF", "HEIF", "AVIF", "JPEG2000", "TGA", "ICO", "DIB", "PCX", "QOI", "SGI")
# Of files that are taken for pictures where a folder holds others as well.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pixels:
    """One image, ready for the model.

    data: uint8 [H, W, 3], or [tiles, H, W, 3] in the families that tile, on the host or, being
    computed perhaps, on the device. size: the original (width, height). reduction: how its visual
    tokens become fewer; None leaves all of them.
    """

    kind: ClassVar[str] = "image"  # the type of its part in a chat message
    data: Levels
    size: tuple[int, int]
    reduction: Reduction | None = field(default=None, kw_only=True)


def open_picture(source: Any, draft_side: int | None = None) -> Picture:
    """`open_image`, on the device where pictures are resized there."""
    if not pictures_on_device():
        return open_image(source, draft_side)
    from .device import DeviceImage

    image = _open(source, draft_side, on_device=True)
    return image if isinstance(image, DeviceImage) else DeviceImage.of(image)


def open_image(source: Any, draft_side: int | None = None) -> "Image":
    """A path, http(s) or file URL, data: URI, file content, open file, page of a PDF, Pillow image
    or uint8 array -> RGB image.

    Upright by its EXIF orientation, transparency on white, 16-bit grey scaled to 8 bits, the first
    frame of an animation. What the data is decides, never a file name or a mime type.
    draft_side: a JPEG may be decoded at a half, a quarter or an eighth of its size as long as no
    side is shorter than this; much faster, and not the same pixels.
    Raises UsageError naming the source when it can't be read, isn't an image, is damaged, or has
    more than MAX_PIXELS pixels.
    """
    image: Image = _open(source, draft_side)
    return image


def _open(source: Any, draft_side: int | None, on_device: bool = False) -> Any:
    """`open_image`; on_device: a DeviceImage of what is decoded straight into one."""
    from PIL import Image

    page = None
    if isinstance(source, Page):
        source, page = source.source, source.number
    if isinstance(source, Image.Image):
        return _from_pillow(source)
    if isinstance(source, str) and _is_address(source):
        from .fetch import fetch

        name = "the data: URI" if source[:5].lower() == "data:" else shown(source)
        content = fetch(source, name)
        if isinstance(content, bytes):
            return _decode(content, name, draft_side, page, on_device)
        source = content  # a file's path
    if isinstance(source, str | Path):
        return _decode(_checked_path(source), shown(str(source)), draft_side, page, on_device)
    if callable(getattr(source, "read", None)):
        with finding("the open file"):
            source = source.read()
        if isinstance(source, str):
            raise UsageError("the open file gives text: open pictures with mode 'rb'")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "the image data", draft_side, page, on_device)
    if hasattr(source, "__array_interface__"):
        return _from_array(source)
    raise UsageError(
        f"cannot read an image from {type(source).__name__}: "
        "give a path, a URL, bytes, an open file, a Pillow image or a uint8 array"
    )


def _is_address(source: str) -> bool:
    return source[:5].lower() == "data:" or "://" in source


def _from_pillow(image: "Image") -> "Image":
    from PIL import EpsImagePlugin

    if isinstance(image, EpsImagePlugin.EpsImageFile) and image.tile:  # not yet rendered
        raise UsageError("the Pillow image is a PostScript program, which is not run: save as PNG")
    with reading("the Pillow image"):
        check_size(image.size, "the Pillow image")
        return upright(image)


def shown(name: str) -> str:
    """A source's name as an error shows it: one line, not long, no control characters."""
    if len(name) > SHOWN:
        name = f"{name[: SHOWN // 2]}...{name[-SHOWN // 2 :]}"
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _checked_path(source: str | Path) -> Path:
    name = shown(str(source))
    if not name:
        raise UsageError("an image's name is empty; name a file")
    with finding(name):
        path = expand(source)
        if path.is_dir():
            raise UsageError(f"{name}: is a directory; name an image file in it")
        if not path.exists():
            raise UsageError(f"{name}: no such file; check the path")
        if not path.is_file():
            raise UsageError(f"{name}: not a regular file; use - to read standard input")
        with path.open("rb"):  # whether it may be read
            pass
    return path


@contextmanager
def finding(name: str) -> Iterator[None]:
    """Turn what a name that is no path, or is not ours to read, raises into one line with it."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{name}: cannot be read: {reason}") from None


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises on bad data into one line with the source's name."""
    import warnings

    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but allowed; metadata that doesn't matter here
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(f"{name}: {first_line(error)} Make the image smaller.") from None
    except UnidentifiedImageError:
        raise UsageError(f"{name}: not an image, or in no format known: use PNG or JPEG") from None
    except DAMAGED as error:
        raise UsageError(
            f"{name}: cannot be decoded ({first_line(error)}): "
            "the image may be truncated or damaged; save it again"
        ) from None
    except MemoryError:
        raise UsageError(f"{name}: not enough memory for the image: make it smaller") from None


def _decode(
    source: Path | bytes, name: str, draft_side: int | None, page: int | None, on_device: bool
) -> Picture:
    head = _head(source, name)
    if head.startswith(b"%PDF-"):
        return page_image(source, name, page)
    if page is not None:
        raise UsageError(f"{name}: is not a PDF, which alone has pages: leave the page out")
    with header(source, head, name) as image:
        whole = image.size
        if draft_side:
            image.draft(None, (draft_side, draft_side))
        if image.size != whole:
            rgb = upright(image, release=True)
            rgb.info[DRAFTED] = True
            return rgb
        if (content := jpeg.content_of(image, source)) is None:
            return upright(image, release=True)
        if on_device:
            from .device import decoded

            return decoded(content, image) or upright(image, release=True)
        return upright(image, jpeg.pillow_image(content, image), release=True)


def check_header(source: Any) -> tuple[int, int] | None:
    """(width, height) of a path, an address that is not fetched, or a file's content, upright; None
    of a PDF, whose pages have none.

    Raises UsageError for what `open_image` would refuse, as far as the header tells.
    """
    if isinstance(source, Page):
        source = source.source
    if isinstance(source, str) and _is_address(source):
        from .fetch import fetch

        source = fetch(source, "the data: URI" if source[:5].lower() == "data:" else shown(source))
    name = "the image data" if isinstance(source, bytes) else shown(str(source))
    content = source if isinstance(source, bytes) else _checked_path(source)
    head = _head(content, name)
    if head.startswith(b"%PDF-"):
        return None
    with header(content, head, name) as image:
        return upright_size(image)


def _head(source: Path | bytes, name: str) -> bytes:
    """The first bytes. Raises UsageError when there are none."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with finding(name), source.open("rb") as file:
            head = file.read(12)
    if not head:
        raise UsageError(f"{name}: is empty (0 bytes); save or download it again")
    return head


@contextmanager
def header(source: Path | bytes, head: bytes, name: str) -> "Iterator[Image]":
    """Pillow's image, not decoded yet, of a size that is taken. head: its first 12 bytes."""
    with reading(name):
        if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
            _learn_heif(name)
        with opened(source) as image:
            check_size(image.size, name)
            yield image


def opened(source: Path | bytes) -> "Image":
    """Pillow's image of a file or a file's content in one of the formats that are read."""
    from PIL import Image, UnidentifiedImageError

    content = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(content, formats=COMMON)
    except UnidentifiedImageError:
        Image.init()
        return Image.open(content, formats=[name for name in FORMATS if name in Image.OPEN])


def check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UsageError(f"{name}: the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{name}: {width:,} x {height:,} pixels are more than the limit of "
            f"{MAX_PIXELS // 10**6} million: make the image smaller"
        )
    if max(size) > MAX_SIDE:
        raise UsageError(
            f"{name}: {width:,} x {height:,} pixels: no side may be longer than {MAX_SIDE:,}: "
            "cut the image up"
        )


def _learn_heif(name: str) -> None:
    """Let Pillow read HEIC. Raises UsageError without pi-heif."""
    try:
        from pi_heif import register_heif_opener
    except ImportError:
        raise UsageError(
            f"{name}: reading HEIC photos needs pi-heif: pip install pi-heif"
        ) from None
    register_heif_opener()


def _from_array(source: Any) -> "Image":
    import numpy as np
    from PIL import Image

    array = np.asarray(source)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    color = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (grey or color):
        raise UsageError(
            f"an image array must be uint8 (H, W), (H, W, 3) or (H, W, 4), "
            f"or uint16 (H, W), not {array.dtype} {array.shape}"
        )
    check_size((array.shape[1], array.shape[0]), "the image array")
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))
