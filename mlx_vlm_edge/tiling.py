"""A large image -> square tiles, and where the picture lies in the features of those tiles.

LLaVA's any-resolution scheme: the picture is fitted into that one of several grids which shows most
of it, padded with black, and cut up; the features of the padding are cut off again. Sizes of images
are (width, height), grids of tiles or features are (rows, columns).
Source: LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py and llava/model/llava_arch.py.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
SHRINK_ABOVE = 1.1  # of the allowed length of a side; below it, features are left as they are


class Box(NamedTuple):
    """A part of a grid."""

    top: int
    left: int
    height: int
    width: int


def best_resolution(size: Size, candidates: Iterable[Size]) -> Size:
    """The candidate that keeps most of an image's pixels; of several, the one with least to pad.

    best_resolution((640, 480), [(384, 384), (768, 384), (768, 768)]) -> (768, 768): 640 x 480
    scaled to 768 x 576 keeps all 307,200 pixels, scaled to 512 x 384 or 384 x 288 it does not.
    """
    width, height = size

    def merit(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - candidate[0] * candidate[1]

    return max(candidates, key=merit)


def scaled_size(size: Size, target: Size) -> Size:
    """`size` scaled to touch `target`, keeping its shape; the free side is rounded up.

    scaled_size((640, 480), (768, 768)) -> (768, 576)
    """
    (width, height), (w, h) = size, target
    across, down = w / width, h / height
    if across < down:
        return w, min(math.ceil(height * across), h)
    return min(math.ceil(width * down), w), h


def cut(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 [rows * side, columns * side, 3] -> tiles [rows * columns, side, side, 3], row by row.

    A picture of 2 x 3 tiles gives (row 0, column 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2).
    """
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    tiles = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, side, side, 3)


def anyres_tiles(image: "Image", side: int, candidates: Iterable[Size]) -> np.ndarray:
    """uint8 [1 + rows * columns, side, side, 3]: the whole image, then the parts of the best fit.

    The first tile is the image stretched to a square, as the original has it. Candidates are
    multiples of `side`.
    """
    from PIL import Image
    from PIL.Image import Resampling

    target = best_resolution(image.size, candidates)
    scaled = scaled_size(image.size, target)
    canvas = Image.new("RGB", target)
    corner = ((target[0] - scaled[0]) // 2, (target[1] - scaled[1]) // 2)
    canvas.paste(image.resize(scaled, Resampling.BICUBIC), corner)
    whole = image.resize((side, side), Resampling.BICUBIC)
    return np.concatenate([np.asarray(whole)[None], cut(np.asarray(canvas), side)])


def unpad(size: Size, grid: Size) -> Box:
    """The part of a grid of features that shows the picture, the rest being its padding.

    unpad((640, 480), (54, 54)) -> top 7, left 0, height 40, width 54. In whole numbers, so that
    54 * 480 / 640 is 40.5 and no float beside it; padding is cut off equally on both sides.
    """
    (width, height), (rows, columns) = size, grid
    if width * rows > columns * height:
        top = (rows - height * columns // width) // 2
        return Box(top, 0, rows - 2 * top, columns)
    left = (columns - width * rows // height) // 2
    return Box(0, left, rows, columns - 2 * left)


def capped(height: int, width: int, limit: int) -> Size:
    """The grid that features of height x width are shrunk to, so that about `limit` remain.

    capped(108, 108, 9 * 27 ** 2) -> (81, 81); capped(88, 88, 9 * 27 ** 2) -> (88, 88), since
    sqrt(88 * 88 / 6561) is below 1.1.
    """
    ratio = math.sqrt(height * width / limit)
    if ratio <= SHRINK_ABOVE:
        return height, width
    return int(height // ratio), int(width // ratio)
