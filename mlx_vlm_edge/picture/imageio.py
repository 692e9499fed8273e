"""JPEGs by macOS's own ImageIO, through pyobjc, where the user asks for it.

Nobody here has seen it on a Mac. Apple's decoder need not give libjpeg-turbo's bytes, so nothing
chooses it by itself; `doctor --selftest` says on the user's Mac how far its pixels are off.
"""

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "MLX_VLM_EDGE_DECODER"
NAME = "imageio"
# Quartz's CGImageAlphaInfo and CGBitmapInfo: red, green, blue and perhaps a byte that says nothing.
PLAIN_ALPHA = {24: (0,), 32: (5,)}  # by bits of a pixel: none; none, skip the last
ALPHA, ORDER = 0x1F, 0x7000  # masks
PLAIN_ORDERS = (0x0000, 0x4000)  # the default, and 32 bits from the highest byte on


def asked() -> bool:
    """Whether $MLX_VLM_EDGE_DECODER says so. Raises UsageError for another word, and where there
    is no ImageIO."""
    word = os.environ.get(VARIABLE, "")
    if not word:
        return False
    if word.lower() != NAME:
        raise UsageError(f"{VARIABLE}={word[:40]}: imageio is known, or nothing for libjpeg-turbo")
    lack = lacking()
    if lack is not None:
        raise UsageError(f"{VARIABLE}={NAME}: {lack}; unset, libjpeg-turbo decodes")
    return True


def lacking() -> str | None:
    """Why there is no ImageIO here; None where there is."""
    if sys.platform != "darwin":
        return "ImageIO is macOS's"
    if find_spec("Quartz") is None:
        return "pyobjc is not installed (pip install pyobjc-framework-Quartz)"
    return None


def decode(content: bytes, buffer: "np.ndarray") -> bool:
    """A JPEG into uint8 [H, W, 3] or [H, W, 4] (the last of them is nothing), as it lies and in its
    own colours; whether it was done. What lies in memory another way is left to others."""
    import numpy as np
    import Quartz

    source = Quartz.CGImageSourceCreateWithData(content, None)
    image = None
    if source is not None:
        image = Quartz.CGImageSourceCreateImageAtIndex(source, 0, None)
    if image is None or not _plain(Quartz, image, buffer.shape):
        return False
    data = Quartz.CGDataProviderCopyData(Quartz.CGImageGetDataProvider(image))
    height, width = buffer.shape[:2]
    row, stored = Quartz.CGImageGetBytesPerRow(image), Quartz.CGImageGetBitsPerPixel(image) // 8
    if data is None or len(data) < row * (height - 1) + width * stored:
        return False
    flat = np.frombuffer(data, np.uint8)
    lines = np.lib.stride_tricks.as_strided(
        flat, (height, width, stored), (row, stored, 1), writeable=False
    )
    buffer[..., :3] = lines[..., :3]
    return True


def _plain(quartz: Any, image: Any, shape: tuple[int, ...]) -> bool:
    """Whether a CGImage has so many rows and columns of red, green and blue in bytes."""
    bits, info = quartz.CGImageGetBitsPerPixel(image), quartz.CGImageGetBitmapInfo(image)
    return (
        (quartz.CGImageGetHeight(image), quartz.CGImageGetWidth(image)) == shape[:2]
        and quartz.CGImageGetBitsPerComponent(image) == 8
        and (info & ALPHA) in PLAIN_ALPHA.get(bits, ())
        and (info & ORDER) in PLAIN_ORDERS
    )
