"""A large image -> square tiles, and where the picture lies in the features of those tiles.

LLaVA's any-resolution scheme: the picture is fitted into that one of several grids which shows most
of it, padded with black, and cut up; the features of the padding are cut off again.
Idefics3's splitting: the longest edge is brought to a fixed length (small images are enlarged),
both edges to multiples of the tile's, and the whole image, one tile large, follows the tiles.
Sizes of images are (width, height), grids of tiles or features are (rows, columns).
Source: LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py and llava/model/llava_arch.py; transformers,
models/idefics3/image_processing_idefics3.py (its Pillow form).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .geometry import Size as Size
from .image import Pixels
from .resize import Levels, Picture, joined, levels, padded, resized

MAX_EDGE = 4096  # pixels, of an image that Idefics3 cuts up
SHRINK_ABOVE = 1.1  # of the allowed length of a side; below it, features are left as they are


@dataclass(frozen=True, eq=False)
class Tiles(Pixels):
    """An image's tiles, row by row, and the whole image, which is all there is of 0 rows."""

    rows: int = 0
    columns: int = 0


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


def cut(pixels: Levels, side: int) -> Levels:
    """uint8 [rows * side, columns * side, 3] -> tiles [rows * columns, side, side, 3], row by row.

    A picture of 2 x 3 tiles gives (row 0, column 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2).
    """
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    tiles = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, side, side, 3)


def anyres_tiles(image: Picture, side: int, candidates: Iterable[Size]) -> Levels:
    """uint8 [1 + rows * columns, side, side, 3]: the whole image, then the parts of the best fit.

    The first tile is the image stretched to a square, as the original has it. Candidates are
    multiples of `side`.
    """
    from PIL.Image import Resampling

    target = best_resolution(image.size, candidates)
    scaled = scaled_size(image.size, target)
    left, top = (target[0] - scaled[0]) // 2, (target[1] - scaled[1]) // 2
    right, below = target[0] - scaled[0] - left, target[1] - scaled[1] - top
    picture = levels(resized(image, scaled, Resampling.BICUBIC))
    canvas = padded(picture, right, below, 0, left, top)
    whole = levels(resized(image, (side, side), Resampling.BICUBIC))
    return joined([whole[None], cut(canvas, side)])


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


def fit_within(size: Size, limit: Size) -> Size:
    """The (width, height) of a picture scaled down, where it must be, to fit `limit`.

    (4000, 3000) in (1920, 1080) -> (1440, 1080); (300, 200) stays. Rounded down as Fuyu does it.
    """
    (width, height), (most_wide, most_high) = size, limit
    if width <= most_wide and height <= most_high:
        return size
    scale = min(most_high / height, most_wide / width)
    return max(1, int(width * scale)), max(1, int(height * scale))


def longest_edge_size(size: Size, longest: int) -> Size:
    """The size with its longest edge at `longest`, the other one even, as Idefics3 rounds it.

    longest_edge_size((640, 480), 1456) -> (1456, 1092); (3000, 500) -> (1456, 242)
    """
    width, height = size
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    return _below_max_edge(max(width, 1), max(height, 1))


def _below_max_edge(width: int, height: int) -> Size:
    aspect = width / height
    if width >= height > 0 and width > MAX_EDGE:
        width, height = MAX_EDGE, int(MAX_EDGE / aspect)
    elif height > width and height > MAX_EDGE:
        width, height = int(MAX_EDGE * aspect), MAX_EDGE
    return max(width, 1), max(height, 1)


def whole_tiles_size(size: Size, tile: int) -> Size:
    """The size with both edges at multiples of `tile`; the longer one decides, both round up.

    whole_tiles_size((1456, 1092), 364) -> (1456, 1092); (1456, 820) -> (1456, 1092)
    """
    width, height = size
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return width, height


def split_grid(size: Size, longest: int, tile: int) -> tuple[int, int]:
    """(rows, columns) an image of that size is cut into; (0, 0) when it is one tile, uncut.

    split_grid((640, 480), 1456, 364) -> (3, 4), which makes 13 tiles with the whole image.
    """
    width, height = whole_tiles_size(longest_edge_size(size, longest), tile)
    if width <= tile and height <= tile:
        return 0, 0
    return height // tile, width // tile


def affordable_edge(size: Size, longest: int, tile: int, limit: int) -> int:
    """`longest`, or the multiple of `tile` below it, that makes at most `limit` tiles of an image.

    affordable_edge((640, 480), 1456, 364, 8) -> 728, which makes 2 x 2 + 1 tiles; 1092 makes
    3 x 3 + 1 and 1456 makes 3 x 4 + 1.
    """
    while longest > tile:
        rows, columns = split_grid(size, longest, tile)
        if rows * columns + 1 <= limit:
            break
        longest = (longest - 1) // tile * tile
    return longest


def split(image: Picture, longest: int, tile: int) -> Levels:
    """Tiles uint8 [rows * columns + 1, tile, tile, 3] of `split_grid`, row by row, the whole last.

    Lanczos on uint8, twice, as the original; the whole image is made of the second result.
    """
    from PIL.Image import Resampling

    lanczos = Resampling.LANCZOS
    first = resized(image, longest_edge_size(image.size, longest), lanczos)
    large = resized(first, whole_tiles_size(first.size, tile), lanczos)
    whole = levels(resized(large, (tile, tile), lanczos))[None]
    if large.size == (tile, tile):
        return whole
    return joined([cut(levels(large), tile), whole])


def single(image: Picture, longest: int, tile: int) -> Levels:
    """The whole image as one tile, uint8 [1, tile, tile, 3], by way of its longest edge."""
    from PIL.Image import Resampling

    first = resized(image, longest_edge_size(image.size, longest), Resampling.LANCZOS)
    return levels(resized(first, (tile, tile), Resampling.LANCZOS))[None]
