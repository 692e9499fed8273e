"""A picture from anywhere -> an upright RGB image -> the model's size, in uint8 throughout.

Pillow is imported at first use. Sizes are (width, height), arrays are (H, W, 3).
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image, Resampling

Strategy = Literal["pad", "center_crop", "stretch"]
Color = tuple[int, int, int]

# Pillow's own hard limit (two times its MAX_IMAGE_PIXELS): 13,377 x 13,377, or 0.7 GB as Pillow
# holds it. Checked on the header, before anything is decoded.
MAX_PIXELS = 178_956_970
STRIP = 256  # rows resized at a time when padding
SHOWN = 80  # characters of a source's name in an error
ORIENTATION = 0x0112  # EXIF tag
DRAFTED = "decoded at a part of its size"  # key of a picture's info
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# What Pillow's decoders raise on damaged data (OSError includes UnidentifiedImageError).
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError,
           AttributeError, OverflowError, struct.error, zlib.error)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pixels:
    """One image, ready for the model.

    data: uint8 [H, W, 3], or [tiles, H, W, 3] in the families that tile. size: the original
    (width, height). mask: bool, which patches are picture and not padding; None when all are.
    """

    kind: ClassVar[str] = "image"  # the type of its part in a chat message
    data: "np.ndarray"
    size: tuple[int, int]
    mask: "np.ndarray | None" = None


def open_image(
    source: "str | Path | bytes | Image | np.ndarray", draft_side: int | None = None
) -> "Image":
    """A path, http(s) URL, data: URI, file content, Pillow image or uint8 array -> RGB image.

    Upright by its EXIF orientation, transparency on white, 16-bit grey scaled to 8 bits, the first
    frame of an animation. What the data is decides, never a file name or a mime type.
    draft_side: a JPEG may be decoded at a half, a quarter or an eighth of its size as long as no
    side is shorter than this; much faster, and not the same pixels.
    Raises UsageError naming the source when it can't be read, isn't an image, is damaged, or has
    more than MAX_PIXELS pixels.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        with reading("the Pillow image"):
            return _upright_rgb(source)
    if isinstance(source, str) and (source[:5].lower() == "data:" or "://" in source):
        from .fetch import fetch

        name = "the data: URI" if source[:5].lower() == "data:" else _short(source)
        return _decode(fetch(source, name), name, draft_side)
    if isinstance(source, str | Path):
        return _decode(_checked_path(source), _short(str(source)), draft_side)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "the image data", draft_side)
    if hasattr(source, "__array_interface__"):
        return _from_array(source)
    raise UsageError(
        f"cannot read an image from {type(source).__name__}: "
        "give a path, a URL, bytes, a Pillow image or a uint8 array"
    )


def _short(name: str) -> str:
    name = name.replace("\n", " ").replace("\r", " ")
    return name if len(name) <= SHOWN else f"{name[: SHOWN // 2]}...{name[-SHOWN // 2 :]}"


def _checked_path(source: str | Path) -> Path:
    name = _short(str(source))
    if not name:
        raise UsageError("an image's name is empty; name a file")
    with finding(name):
        path = Path(source).expanduser()
        if path.is_dir():
            raise UsageError(f"{name}: is a directory; name an image file in it")
        if not path.exists():
            raise UsageError(f"{name}: no such file; check the path")
        if not path.is_file():
            raise UsageError(f"{name}: not a regular file; use - to read standard input")
        with path.open("rb"):  # whether it may be read
            pass
    return path


@contextmanager
def finding(name: str) -> Iterator[None]:
    """Turn what a name that is no path, or is not ours to read, raises into one line with it."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{name}: cannot be read: {reason}") from None


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises on bad data into one line with the source's name."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(f"{name}: {_first_line(error)} Make the image smaller.") from None
    except UnidentifiedImageError:
        raise UsageError(f"{name}: not an image, or in no format known: use PNG or JPEG") from None
    except DAMAGED as error:
        raise UsageError(
            f"{name}: cannot be decoded ({_first_line(error)}): "
            "the image may be truncated or damaged; save it again"
        ) from None
    except MemoryError:
        raise UsageError(f"{name}: not enough memory for the image: make it smaller") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _decode(source: Path | bytes, name: str, draft_side: int | None = None) -> "Image":
    import warnings

    from PIL import Image

    if not (source if isinstance(source, bytes) else source.stat().st_size):
        raise UsageError(f"{name}: is empty (0 bytes); save or download it again")
    with reading(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large but allowed; metadata that doesn't matter here
        _learn_heif(source, name)
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(opened) as image:
            _check_size(image.size, name)
            whole = image.size
            if draft_side:
                image.draft(None, (draft_side, draft_side))
            rgb = _upright_rgb(image)
            if image.size != whole:
                rgb.info[DRAFTED] = True
            return rgb


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UsageError(f"{name}: the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{name}: {width:,} x {height:,} pixels are more than the limit of "
            f"{MAX_PIXELS // 10**6} million: make the image smaller"
        )


def _learn_heif(source: Path | bytes, name: str) -> None:
    """Let Pillow read HEIC, when `source` is one. Raises UsageError without pillow-heif."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with source.open("rb") as file:
            head = file.read(12)
    if head[4:8] != b"ftyp" or head[8:12] not in HEIF_BRANDS:
        return
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise UsageError(
            f"{name}: reading HEIC photos needs pillow-heif: pip install 'mlx-vlm-edge[heic]'"
        ) from None
    register_heif_opener()


def _upright_rgb(image: "Image") -> "Image":
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
    image.load()
    rgb = _to_rgb(image)
    try:
        orientation = image.getexif().get(ORIENTATION)
    except DAMAGED:
        orientation = None  # damaged EXIF does not spoil the picture
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if ("A" in image.mode.upper() and image.mode != "LAB") or "transparency" in image.info:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: "Image") -> "Image":
    """Grey 0..65535 -> RGB 0..255, rounded; mode I holds the same range in 32 bits."""
    import numpy as np
    from PIL import Image

    table = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    values = np.asarray(image)
    if image.mode == "I":
        values = np.clip(values, 0, 65535)
    return Image.fromarray(table[values]).convert("RGB")


def _from_array(source: Any) -> "Image":
    import numpy as np
    from PIL import Image

    array = np.asarray(source)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    color = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (grey or color):
        raise UsageError(
            f"an image array must be uint8 (H, W), (H, W, 3) or (H, W, 4), "
            f"or uint16 (H, W), not {array.dtype} {array.shape}"
        )
    _check_size((array.shape[1], array.shape[0]), "the image array")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def fit(
    image: "Image", size: tuple[int, int], strategy: Strategy, fill: Color = (0, 0, 0)
) -> "Image":
    """Bring an RGB image to `size` (width, height) with Pillow's bicubic filter, as the references.

    A picture read by JPEG draft, which is not theirs anyway, is resized by a cheaper filter.

    pad: centred on a canvas of the target's shape filled with `fill`, then resized (LLaVA's
    expand2square). center_crop: resized to cover the target, then cropped (CLIPImageProcessor).
    stretch: resized without keeping the shape.
    Raises UsageError for an image so elongated that it can't be brought to the size in memory.
    """
    if strategy == "stretch":
        return image.resize(size, _filter(image))
    return _pad(image, size, fill) if strategy == "pad" else _center_crop(image, size)


def _filter(image: "Image") -> "Resampling":
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
    (width, height), (w, h) = image.size, size
    canvas_width, canvas_height = max(width, -(-height * w // h)), max(height, -(-width * h // w))
    left, top = (canvas_width - width) // 2, (canvas_height - height) // 2
    _check_elongation(image, w * canvas_height)
    narrow = Image.new("RGB", (w, canvas_height), fill)
    if canvas_width == width:
        narrow.paste(image.resize((w, height), kind), (0, top))
        return narrow.resize(size, kind)
    for start in range(0, height, STRIP):
        rows = image.crop((0, start, width, min(start + STRIP, height)))
        padded = Image.new("RGB", (canvas_width, rows.height), fill)
        padded.paste(rows, (left, 0))
        narrow.paste(padded.resize((w, rows.height), kind), (0, top + start))
    return narrow.resize(size, kind)


def _center_crop(image: "Image", size: tuple[int, int]) -> "Image":
    (width, height), (w, h) = image.size, size
    wide = width * h > height * w
    cover = (int(h * width / height), h) if wide else (w, int(w * height / width))
    _check_elongation(image, cover[0] * cover[1])
    left, top = (cover[0] - w) // 2, (cover[1] - h) // 2
    return image.resize(cover, _filter(image)).crop((left, top, left + w, top + h))


def _check_elongation(image: "Image", pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise UsageError(
            f"an image of {image.width:,} x {image.height:,} pixels is too elongated: "
            "crop it, or use the image strategy stretch"
        )
