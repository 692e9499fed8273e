"""A JPEG that Pillow has opened and checked -> its pixels by libjpeg-turbo, straight into an array.

Pillow decodes with the same library, in rows that it copies into an image of its own. What is not
quite in order is left to Pillow, which knows what to make of it: nothing else is read than without
this, and every byte is the same.
"""

import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import imageio

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# Bytes of a file for each pixel; photos have one or two at the most. More is not read at once.
DENSEST = 4
HEAD = 1 << 16  # bytes that a file may have besides


def content_of(image: "Image", source: Path | bytes) -> bytes | None:
    """The file that Pillow has opened as `image`, if it is a JPEG in colour."""
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return None
    if isinstance(source, bytes):
        return source
    if source.stat().st_size > image.width * image.height * DENSEST + HEAD:
        return None
    return source.read_bytes()


def decode(content: bytes, buffer: "np.ndarray") -> bool:
    """Into uint8 [H, W, 3] or [H, W, 4] (the last of them is nothing); whether it was done."""
    if imageio.asked():
        done = imageio.decode(content, buffer)
        if not done:
            print(
                "note: ImageIO gives this JPEG in no known form; Pillow decodes it", file=sys.stderr
            )
        return done
    try:
        import simplejpeg
    except ImportError:  # Pillow alone does it too
        return False
    height, width, channels = buffer.shape
    try:
        if simplejpeg.decode_jpeg_header(content)[:2] != (height, width):
            return False
        simplejpeg.decode_jpeg(content, "RGB" if channels == 3 else "RGBX", buffer=buffer)
    except (ValueError, struct.error):  # damage, or what it takes for damage
        return False
    return True


def pillow_image(content: bytes, image: "Image") -> "Image | None":
    """The picture as an RGB image of Pillow's over an array that was decoded into."""
    import numpy as np
    from PIL import Image

    buffer = np.empty((image.height, image.width, 4), np.uint8)
    if not decode(content, buffer):
        return None
    whole = Image.frombuffer("RGBX", image.size, buffer, "raw", "RGBX", 0, 1)
    try:
        return Image.fromarrow(whole, "RGB", image.size)  # the same memory by another name
    except (AttributeError, ValueError):  # Pillow before 11.3
        return whole.convert("RGB")
