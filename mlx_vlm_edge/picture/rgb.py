"""A Pillow image of any mode -> upright RGB in 8 bits: transparency on white, 16-bit grey scaled.

Where that takes several steps they are done some rows at a time, so that a picture is in memory
twice at most: as it was read, and as RGB.
"""

import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from PIL.Image import Image

STRIP = 1 << 22  # pixels worked on at a time
ORIENTATION = 0x0112  # EXIF tag
SIDEWAYS = range(5, 9)  # its values that exchange the sides
# What Pillow's decoders raise on damaged data. OSError includes UnidentifiedImageError; AVIF and
# HEIF raise RuntimeError, which NotImplementedError is as well.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError,
           AttributeError, OverflowError, RuntimeError, struct.error, zlib.error)  # fmt: skip


def orientation(image: "Image") -> int:
    """How a picture lies, by EXIF's number; 1 is upright."""
    try:
        number = image.getexif().get(ORIENTATION)
    except DAMAGED:  # damaged EXIF does not spoil the picture
        return 1
    return number if isinstance(number, int) and 1 <= number <= 8 else 1


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
    return (height, width) if orientation(image) in SIDEWAYS else (width, height)


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
