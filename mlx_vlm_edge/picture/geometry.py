"""Where a picture lies in what the model sees of it, and in which order a resize goes about it.

Sizes are (width, height).
"""

from functools import cache
from typing import Literal

Strategy = Literal["pad", "center_crop", "stretch"]
Color = tuple[int, int, int]
Size = tuple[int, int]


def canvas_size(size: Size, target: Size) -> Size:
    """The smallest canvas of the target's shape that a picture fits on."""
    (width, height), (w, h) = size, target
    return max(width, -(-height * w // h)), max(height, -(-width * h // w))


def cover_size(size: Size, target: Size) -> Size:
    """A picture's size scaled so that it covers the target: one side is its, the other longer."""
    (width, height), (w, h) = size, target
    wide = width * h > height * w
    return (int(h * width / height), h) if wide else (w, int(w * height / width))


@cache
def _pillow() -> tuple[int, int]:
    from PIL import __version__

    major, minor = __version__.split(".")[:2]
    return int(major), int(minor)


def height_first(size: Size, target: Size) -> bool:
    """Whether the installed Pillow resizes the height before the width, rounding in between.

    Before 12.2 it never did. Source: Pillow's pull requests 9524 (12.2) and 9549 (13.0); the rule
    of the second, as merged, was taken from what the wheel does.
    """
    (width, height), (w, h) = size, target
    if h >= height or _pillow() < (12, 2):
        return False
    if _pillow() < (13, 0):
        return height > width * 100
    return height - h > 2 * (width - w)
