"""An upright RGB image -> the model's size, in uint8 throughout, byte for byte as Pillow resizes.

On the host by Pillow's own loops, in several threads where a picture is large; on a GPU there
(`device.py`). Sizes are (width, height), arrays are (H, W, 3).
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Union

from .geometry import Color, Size, Strategy, canvas_size, cover_size, height_first

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from PIL.Image import Image, Resampling

    from .device import DeviceImage
    from .resample import Axis

Picture = Union["Image", "DeviceImage"]
Levels = Union["np.ndarray", "mx.array"]  # uint8, on the host or on the device
Box = tuple[int, int, int, int]  # left, top, right, bottom

STRIP = 256  # rows resized at a time
LARGE = 1 << 20  # pixels from which on several threads resize a picture
THREADS = 4  # at most; the memory is the limit then
ELONGATED = 4  # times more work than a part of the outputs costs: then it is that part alone
DRAFTED = "decoded at a part of its size"  # key of a picture's info


def levels(image: Picture) -> Levels:
    """uint8 [H, W, 3] of a picture, where it lies."""
    import numpy as np
    from PIL import Image

    return np.asarray(image) if isinstance(image, Image.Image) else image.data


def begin(pixels: Levels) -> None:
    """Let the device set out on them, which is also what lets another thread use them."""
    import numpy as np

    if not isinstance(pixels, np.ndarray):
        import mlx.core as mx

        mx.async_eval(pixels)


def padded(
    pixels: Levels, right: int, below: int, value: int, left: int = 0, above: int = 0
) -> Levels:
    """uint8 [H, W, 3] with that many more columns and rows of one value."""
    import numpy as np

    widths = [(above, below), (left, right), (0, 0)]
    if isinstance(pixels, np.ndarray):
        return np.pad(pixels, widths, constant_values=value)
    import mlx.core as mx

    return mx.pad(pixels, widths, constant_values=mx.array(value, mx.uint8))


def joined(tiles: Sequence[Levels]) -> Levels:
    """uint8 [N, H, W, 3] of several such."""
    import numpy as np

    if isinstance(tiles[0], np.ndarray):
        return np.concatenate(tiles)
    import mlx.core as mx

    return mx.concatenate(list(map(mx.array, tiles)))


def fit(image: Picture, size: Size, strategy: Strategy, fill: Color = (0, 0, 0)) -> Picture:
    """Bring an RGB image to `size` (width, height) with Pillow's bicubic filter, as the references.

    A picture read by JPEG draft, which is not theirs anyway, is resized by a cheaper filter.

    pad: centred on a canvas of the target's shape filled with `fill`, then resized (LLaVA's
    expand2square). center_crop: resized to cover the target, then cropped (CLIPImageProcessor).
    stretch: resized without keeping the shape.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        return image.fitted(size, strategy, fill, _filter(image))
    if strategy == "stretch":
        return resized(image, size, _filter(image))
    return _pad(image, size, fill) if strategy == "pad" else _center_crop(image, size)


def resized(image: Picture, size: Size, kind: int) -> Picture:
    """Pillow's resize of an RGB image, by one of its filters."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        return image.resize(size, kind)
    return _windowed(image, size, kind, (0, 0, *size))


def _windowed(image: "Image", size: Size, kind: int, window: Box) -> "Image":
    """A part of a resized picture: (left, top, right, bottom) of `size`.

    A large one side after the other, as Pillow does it, in strips that several threads take.
    """
    (width, height), (w, h), (left, top, right, bottom) = image.size, size, window
    if width * height < LARGE or size == image.size or _processors() < 2:
        return _cropped(image.resize(size, kind), window)
    if height_first(image.size, size):
        rows = _cropped(_one_side(image, (width, h), kind), (0, top, width, bottom))
        return _cropped(_one_side(rows, (w, bottom - top), kind), (left, 0, right, bottom - top))
    columns = _cropped(_one_side(image, (w, height), kind), (left, 0, right, height))
    return _cropped(_one_side(columns, (right - left, h), kind), (0, top, right - left, bottom))


def _cropped(image: "Image", box: Box) -> "Image":
    return image if box == (0, 0, *image.size) else image.crop(box)


def _one_side(image: "Image", size: Size, kind: int) -> "Image":
    """A resize that changes one side, which every row, or column, goes through by itself."""
    from PIL import Image

    (width, height), (w, h) = image.size, size
    if size == image.size:
        return image
    result = Image.new("RGB", size)

    def rows(start: int, end: int) -> None:
        part = image.crop((0, start, width, end))
        result.paste(part.resize((w, end - start), kind), (0, start))

    def columns(start: int, end: int) -> None:
        part = image.crop((start, 0, end, height))
        result.paste(part.resize((end - start, h), kind), (start, 0))

    _in_strips(height if h == height else width, rows if h == height else columns)
    return result


def _in_strips(length: int, work: Callable[[int, int], None]) -> None:
    """`work(start, end)` for all of a length, by several threads: Pillow's loops let others run."""
    starts = range(0, length, STRIP)
    threads = min(len(starts), THREADS, _processors())
    if threads < 2:
        for start in starts:
            work(start, min(start + STRIP, length))
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        ends = (min(start + STRIP, length) for start in starts)
        for _ in pool.map(work, starts, ends):  # raises what a thread raised
            pass


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _turned(image: "Image") -> "Image":
    """With rows for columns: what is resized in one order here, Pillow resizes in the other."""
    from PIL.Image import Transpose

    return image.transpose(Transpose.TRANSPOSE)


def _filter(image: Picture) -> "Resampling":
    """Bicubic, or Hamming's window: nearly as sharp when it shrinks, by half as many pixels."""
    from PIL.Image import Resampling

    return Resampling.HAMMING if DRAFTED in image.info else Resampling.BICUBIC


def _pad(image: "Image", size: tuple[int, int], fill: Color) -> "Image":
    """Pad, then resize, without ever holding the padded canvas.

    Pillow resizes rows first, then columns, rounding to uint8 in between. So the rows can be
    padded and resized a strip at a time, and the rest of the canvas added after that.
    """
    from PIL import Image

    kind = _filter(image)
    (width, height), w = image.size, size[0]
    canvas_width, canvas_height = canvas_size(image.size, size)
    if height_first((canvas_width, canvas_height), size):
        return _turned(_pad(_turned(image), size[::-1], fill))
    left, top = (canvas_width - width) // 2, (canvas_height - height) // 2
    if max(canvas_width // width, canvas_height // height) > ELONGATED:
        return _pad_thin(image, size, fill, (canvas_width, canvas_height))
    narrow = Image.new("RGB", (w, canvas_height), fill)

    def rows(start: int, end: int) -> None:
        part = image.crop((0, start, width, end))
        if canvas_width > width:
            padded = Image.new("RGB", (canvas_width, end - start), fill)
            padded.paste(part, (left, 0))
            part = padded
        narrow.paste(part.resize((w, end - start), kind), (0, top + start))

    _in_strips(height, rows)
    return _windowed(narrow, size, kind, (0, 0, *size))


def _pad_thin(
    image: "Image", size: tuple[int, int], fill: Color, canvas: tuple[int, int]
) -> "Image":
    """The same for a long thin picture: only what its pixels touch is computed."""
    import numpy as np
    from PIL import Image

    (width, height), (w, h), kind = image.size, size, _filter(image)
    result = Image.new("RGB", size, fill)
    if canvas[0] > width:
        axis, lead = _axis(kind, canvas[0], w), (canvas[0] - width) // 2
        first, last = axis.touched(lead, width)
        columns = np.asarray(image).swapaxes(0, 1)
        part = axis.resized(columns, lead, first, last, fill).swapaxes(0, 1)
        result.paste(Image.fromarray(part).resize((last - first, h), kind), (first, 0))
    else:
        axis, lead = _axis(kind, canvas[1], h), (canvas[1] - height) // 2
        first, last = axis.touched(lead, height)
        rows = np.asarray(image.resize((w, height), kind))
        result.paste(Image.fromarray(axis.resized(rows, lead, first, last, fill)), (0, first))
    return result


def _axis(kind: "Resampling", total: int, size: int) -> "Axis":
    from .resample import FILTERS, Axis

    return Axis(total, size, *FILTERS[kind])


def _center_crop(image: "Image", size: tuple[int, int]) -> "Image":
    w, h = size
    cover = cover_size(image.size, size)
    left, top = (cover[0] - w) // 2, (cover[1] - h) // 2
    if cover[0] * cover[1] > ELONGATED * w * h:
        return _crop_thin(image, size, cover)
    return _windowed(image, cover, _filter(image), (left, top, left + w, top + h))


def _crop_thin(image: "Image", size: tuple[int, int], cover: tuple[int, int]) -> "Image":
    """The same for a long thin picture: only what is left of it is computed."""
    import numpy as np
    from PIL import Image

    if height_first(image.size, cover):
        return _turned(_crop_thin(_turned(image), size[::-1], cover[::-1]))
    (width, height), (w, h), kind = image.size, size, _filter(image)
    if cover[0] > w:
        axis, first = _axis(kind, width, cover[0]), (cover[0] - w) // 2
        lead, end = axis.window(first)[0], axis.window(first + w - 1)[1]
        columns = np.asarray(image.crop((lead, 0, end, height))).swapaxes(0, 1)
        part = axis.resized(columns, lead, first, first + w, (0, 0, 0)).swapaxes(0, 1)
        return Image.fromarray(part).resize(size, kind)
    axis, first = _axis(kind, height, cover[1]), (cover[1] - h) // 2
    lead, end = axis.window(first)[0], axis.window(first + h - 1)[1]
    rows = np.asarray(image.crop((0, lead, width, end)).resize((w, end - lead), kind))
    return Image.fromarray(axis.resized(rows, lead, first, first + h, (0, 0, 0)))
