"""A large image -> square tiles for the vision tower. Sizes are (width, height).

Idefics3's splitting: the longest edge is brought to a fixed length (small images are enlarged),
both edges to multiples of the tile's, and the whole image, one tile large, follows the tiles.
Source: transformers, models/idefics3/image_processing_idefics3.py (its Pillow form).
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
MAX_EDGE = 4096  # pixels, of an image that Idefics3 cuts up


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


def split(image: "Image", longest: int, tile: int) -> np.ndarray:
    """Tiles uint8 [rows * columns + 1, tile, tile, 3] of `split_grid`, row by row, the whole last.

    Lanczos on uint8, twice, as the original; the whole image is made of the second result.
    """
    from PIL.Image import Resampling

    lanczos = Resampling.LANCZOS
    first = image.resize(longest_edge_size(image.size, longest), lanczos)
    large = first.resize(whole_tiles_size(first.size, tile), lanczos)
    whole = np.asarray(large.resize((tile, tile), lanczos))[None]
    if large.size == (tile, tile):
        return whole
    columns, rows = large.width // tile, large.height // tile
    cut = np.asarray(large).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    return np.concatenate([cut.reshape(-1, tile, tile, 3), whole])


def single(image: "Image", longest: int, tile: int) -> np.ndarray:
    """The whole image as one tile, uint8 [1, tile, tile, 3], by way of its longest edge."""
    from PIL.Image import Resampling

    first = image.resize(longest_edge_size(image.size, longest), Resampling.LANCZOS)
    return np.asarray(first.resize((tile, tile), Resampling.LANCZOS))[None]
