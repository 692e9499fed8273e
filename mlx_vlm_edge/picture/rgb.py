"""A Pillow image of any mode -> upright RGB in 8 bits: transparency on white, 16-bit grey scaled.

Where that takes several steps they are done some rows at a time, so that a picture is in memory
twice at most: as it was read, and as RGB.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

STRIP = 1 << 22  # pixels worked on at a time
ORIENTATION = 0x0112  # EXIF tag
SIDEWAYS = range(5, 9)  # its values that exchange the sides
METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks of a PNG that may have it
# What Pillow's decoders raise on damaged data. OSError includes UnidentifiedImageError; AVIF and
# HEIF raise RuntimeError, which NotImplementedError is as well.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError,
           AttributeError, OverflowError, RuntimeError, struct.error, zlib.error)  # fmt: skip


def orientation(image: "Image") -> int:
    """How a picture lies, by EXIF's number; 1 is upright."""
    return _lies(image.getexif)


def _lies(exif: Callable[[], Mapping[int, Any]]) -> int:
    try:
        number = exif().get(ORIENTATION)
    except DAMAGED:  # damaged EXIF does not spoil the picture
        return 1
    return number if isinstance(number, int) and 1 <= number <= 8 else 1


def _header_exif(image: "Image") -> "Exif":
    """EXIF of a picture that was just opened. Pillow decodes a PNG without it, to look behind its
    pixels: that is left to those that have something there."""
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngImageFile

    if isinstance(image, PngImageFile) and not _late_metadata(cast(IO[bytes], image.fp)):
        return Image.getexif(image)
    return image.getexif()


def _late_metadata(png: IO[bytes]) -> bool:
    """Whether a PNG may tell how it lies after its pixels."""
    place, seen = png.tell(), False
    png.seek(8)  # behind the signature: chunks of a length, a name, content and a checksum
    while len(start := png.read(8)) == 8 and not (seen and start[4:] in METADATA):
        seen = seen or start[4:] == b"IDAT"
        png.seek(int.from_bytes(start[:4]) + 4, 1)
    png.seek(place)
    return len(start) == 8


def upright(image: "Image", decoded: "Image | None" = None, *, release: bool = False) -> "Image":
    """The whole picture in RGB, turned as its EXIF orientation says.

    decoded: its pixels, where they are here already. release: let go of the picture's own pixels
    as soon as they are not needed.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    rgb = decoded
    if rgb is None:
        image.load()
        rgb = to_rgb(image)
    turn = turns.get(orientation(image))
    if release and rgb is not image:
        image.close()
    return rgb if turn is None else rgb.transpose(turn)


def upright_size(image: "Image") -> tuple[int, int]:
    """(width, height) that `upright` will give, by the header alone."""
    width, height = _stored_size(image)
    sideways = _lies(lambda: _header_exif(image)) in SIDEWAYS
    return (height, width) if sideways else (width, height)


def _stored_size(image: "Image") -> tuple[int, int]:
    """(width, height) as the file has it; Pillow has a TIFF's already turned, and not its pixels
    until they are loaded."""
    if image.format != "TIFF":
        return image.size
    from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

    tags = cast(TiffImageFile, image).tag_v2
    return tags[IMAGEWIDTH], tags[IMAGELENGTH]


def to_rgb(image: "Image") -> "Image":
    clear = image.info.get("transparency") is not None
    if image.mode == "P" and image.palette is not None:
        clear = clear or "A" in image.palette.mode
    if image.mode == "RGB" and not clear:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _by_strips(image, _from_16_bit)
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if clear or ("A" in image.mode.upper() and image.mode != "LAB"):
        return _by_strips(image, _on_white)
    return image.convert("RGB")


def _by_strips(image: "Image", turn: Callable[["Image"], "Image"]) -> "Image":
    from PIL import Image

    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(turn(image.crop(box)), box[:2])
    return rgb


def _on_white(image: "Image") -> "Image":
    from PIL import Image

    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_16_bit(image: "Image") -> "Image":
    """Grey 0..65535 -> RGB 0..255, rounded; mode I holds the same range in 32 bits."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
