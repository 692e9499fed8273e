"""How small a picture may become before what is in it goes: its size and its detail -> a side.

The picture is looked at in grey and at 1024 pixels or so. A candidate's loss is what its smaller
copy, enlarged again, leaves out of the variance inside a cell, in 16 x 16 cells of which flat ones
do not count; the cells that lose most decide. Of a page in letters of 12 pixels (as seen at the
candidate's side) about a quarter is lost, of letters half as high two thirds, of a photograph whose
spectrum falls as photographs' do a fifth at half its size.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import UsageError
from .resize import Levels, Picture

CELLS = 16  # along either side
FLAT = 8.0  # standard deviation of a cell, of 255 levels, up to which there is nothing to lose
DECIDING = 98  # percentile of the cells' losses
MOST_LOST = 0.25  # of a cell's variance


def auto_sides(whole: int, step: int, largest: int | None = None) -> tuple[int, ...]:
    """A quarter, a half, three quarters and all of a side, in whole steps, up to `largest`.

    auto_sides(1024, 64) -> (256, 512, 768, 1024). Raises UsageError where none is within the limit.
    """
    sides = sorted({max(step, whole * part // 4 // step * step) for part in (1, 2, 3, 4)})
    fitting = tuple(side for side in sides if largest is None or side <= largest)
    if not fitting:
        raise UsageError(f"max_resolution {largest}: the smallest size is {sides[0]} pixels")
    return fitting


def chosen_side(image: Picture, sides: Sequence[int], length: int) -> int:
    """The smallest of ascending `sides` that the picture's `length` can become without much loss.

    One that is no shorter than the picture loses nothing. On a GPU the grey copy is waited for.
    """
    if length <= sides[0] or len(sides) == 1:
        return sides[0]
    scale = min(1.0, sides[-1] / length)
    grey = _grey(image, scale)
    for side in sides[:-1]:
        if side >= length or lost(grey, side / (length * scale)) <= MOST_LOST:
            return side
    return sides[-1]


def lost(grey: np.ndarray, scale: float) -> float:
    """What of the variance in a cell goes where a picture, float32[H, W], becomes `scale` times as
    large: of the cells that lose most, 0 to about 1."""
    from PIL import Image
    from PIL.Image import Resampling

    picture = Image.fromarray(grey)
    smaller = picture.resize(_scaled(picture.size, scale), Resampling.BOX)
    left_out = grey - np.asarray(smaller.resize(picture.size, Resampling.BICUBIC))
    variance = _cells(grey * grey) - _cells(grey) ** 2
    busy = variance > FLAT**2
    if not busy.any():
        return 0.0
    return float(np.percentile(_cells(left_out * left_out)[busy] / variance[busy], DECIDING))


def _cells(values: np.ndarray) -> np.ndarray:
    """float32[H, W] -> the mean of each cell; what fills no row or column of cells is left out."""
    rows, columns = (min(CELLS, side) for side in values.shape)
    height, width = values.shape[0] // rows, values.shape[1] // columns
    inside = values[: rows * height, : columns * width]
    means: np.ndarray = inside.reshape(rows, height, columns, width).mean(axis=(1, 3))
    return means


def _grey(image: Picture, scale: float) -> np.ndarray:
    """float32[H, W], scaled down by averages of neighbours."""
    from PIL import Image
    from PIL.Image import Resampling

    size = _scaled(image.size, scale)
    if isinstance(image, Image.Image):
        grey = image.convert("L")
        if size != image.size:
            grey = grey.resize(size, Resampling.BOX, reducing_gap=1.0)
    else:
        data: Levels = image.resize(size, Resampling.BILINEAR).data
        grey = Image.fromarray(np.asarray(data)).convert("L")
    return np.asarray(grey, np.float32)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height
