"""A picture on a GPU: uint8 [H, W, 3] in, resized, padded, cropped and cut there, byte for byte as
Pillow does it on the host.

Two matmuls in the place of Pillow's loops, rounded to bytes after each; see `kernels/banded.py`. On
the CPU pictures stay Pillow's, whose loops are faster there.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..kernels.banded import Bands, bands, resampled
from . import jpeg
from .geometry import Color, Size, Strategy, canvas_size, cover_size, height_first
from .resample import FILTERS, PRECISION, Axis
from .rgb import orientation

if TYPE_CHECKING:
    from PIL.Image import Image

CACHED = 128  # layouts of resizes; a picture takes two for each size


class DeviceImage:
    """What families use of Pillow's images, for uint8 [H, W, 3] on the device. Sizes are (width,
    height), boxes (left, top, right, bottom)."""

    def __init__(self, data: mx.array) -> None:
        self.data = data
        self.info: dict[Any, Any] = {}

    @classmethod
    def of(cls, image: "Image") -> "DeviceImage":
        picture = cls(mx.array(np.asarray(image)))
        picture.info = image.info
        return picture

    @property
    def size(self) -> Size:
        return self.width, self.height

    @property
    def width(self) -> int:
        return int(self.data.shape[1])

    @property
    def height(self) -> int:
        return int(self.data.shape[0])

    def crop(self, box: tuple[int, int, int, int]) -> "DeviceImage":
        left, top, right, bottom = box
        return DeviceImage(self.data[top:bottom, left:right])

    def transposed(self, orientation: int) -> "DeviceImage":
        """Upright, by the number that EXIF has for how it lies."""
        data = self.data.swapaxes(0, 1) if orientation >= 5 else self.data
        data = data[:, ::-1] if orientation in (2, 3, 6, 7) else data
        return DeviceImage(data[::-1] if orientation in (3, 4, 7, 8) else data)

    def resize(self, size: Size, resample: int) -> "DeviceImage":
        (width, height), (w, h) = self.size, size
        return self._resampled(Side(width, w, 0, w), Side(height, h, 0, h), resample)

    def fitted(self, size: Size, strategy: Strategy, fill: Color, resample: int) -> "DeviceImage":
        """`image.fit`."""
        (width, height), (w, h) = self.size, size
        if strategy == "stretch":
            return self.resize(size, resample)
        if strategy == "pad":
            wide, high = canvas_size(self.size, size)
            across = Side(wide, w, 0, w, (wide - width) // 2)
            return self._resampled(
                across, Side(high, h, 0, h, (high - height) // 2), resample, fill
            )
        wide, high = cover_size(self.size, size)
        left, top = (wide - w) // 2, (high - h) // 2
        across, down = Side(width, wide, left, left + w), Side(height, high, top, top + h)
        return self._resampled(across, down, resample)

    def _resampled(
        self, across: "Side", down: "Side", resample: int, fill: Color = (0, 0, 0)
    ) -> "DeviceImage":
        colour = mx.array(fill, mx.int32)

        def along(data: mx.array, side: Side, axis: int) -> mx.array:
            count = data.shape[axis]
            if side == Side(count, count, 0, count):
                return data
            layout = _layout(side, count, resample)
            return resampled(data.swapaxes(0, axis), layout, colour).swapaxes(0, axis)

        passes = [(across, 1), (down, 0)]
        if height_first((across.total, down.total), (across.size, down.size)):
            passes.reverse()
        data = self.data
        for side, axis in passes:
            data = along(data, side, axis)
        return DeviceImage(data)


def decoded(content: bytes, image: "Image") -> DeviceImage | None:
    """A JPEG that Pillow has opened as `image`, decoded into the device's own memory, which this
    processor writes to as well; None where Pillow is to decode it."""
    data = mx.zeros((image.height, image.width, 3), mx.uint8)
    if mx.cuda.is_available():  # memory that moves: a copy of what was decoded
        levels = np.empty(data.shape, np.uint8)
        if not jpeg.decode(content, levels):
            return None
        return DeviceImage(mx.array(levels)).transposed(orientation(image))
    mx.eval(data)
    if not jpeg.decode(content, np.array(data, copy=False)):
        return None
    return DeviceImage(data).transposed(orientation(image))


class Side(NamedTuple):
    """A side of `total` pixels made `size`, of which the ones from first to last - 1 are wanted.

    The picture lies in it from `lead` on; the rest is fill.
    """

    total: int
    size: int
    first: int
    last: int
    lead: int = 0


@lru_cache(CACHED)
def _layout(side: Side, count: int, resample: int) -> Bands:
    axis = Axis(side.total, side.size, *FILTERS[resample])
    starts, weights = axis.taps(side.first, side.last)
    starts -= side.lead
    inputs = starts[:, None] + np.arange(weights.shape[1])
    inside = (inputs >= 0) & (inputs < count)
    outside = np.where(inside, 0, weights).sum(1)
    return bands(starts, np.where(inside, weights, 0), count, outside, PRECISION)
