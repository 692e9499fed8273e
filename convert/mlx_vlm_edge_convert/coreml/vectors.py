"""Test vectors of the preprocessing, for each size of pictures, which a bundle carries: an app that
makes pixels another way than Python does can find out on the device, before its answers differ.

Sources are computed, not stored: `source`. Files are small pictures whose content has a trap.
"""

import base64
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from mlx_vlm_edge.picture.image import fit, open_image

from ..save import save_json
from .names import MAIN
from .parts.encoders import AppPixels

NAME = "preprocessing_vectors.json"
FORMAT = 1
SOURCES = ((37, 53), (200, 120), (97, 411), (640, 480), (1, 9), (3, 700))  # width, height
SAMPLES = 48  # pixels of each result
ORIENTATION = 274  # EXIF tag
DATE = (2026, 1, 1, 0, 0, 0)  # of the profile: with its own hour no two exports were the same bytes
# Display P3's primaries for D50, as ICC profiles have them (SMPTE EG 432-1, Bradford-adapted).
P3 = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
      b"bXYZ": (0.15710, 0.06657, 0.78407)}  # fmt: skip


def source(width: int, height: int) -> np.ndarray:
    """The computed picture of a size, uint8 [H, W, 3]; whole-number arithmetic only."""
    y, x, c = np.mgrid[:height, :width, :3]
    checks = (x // 9 + y // 5) % 2 * 90
    return ((x * x * (c + 1) // 7 + y * (31 - 10 * c) + checks) % 256).astype(np.uint8)


def write_vectors(folder: Path, pixels: Mapping[str, AppPixels]) -> str:
    """Write the vectors for a bundle's own preprocessing, by function; their file's name."""
    further = [
        {"height": each.size[0], "width": each.size[1], "resized": _resized(each)}
        for function, each in pixels.items()
        if function != MAIN
    ]
    content = {"format": FORMAT, "resized": _resized(pixels[MAIN]), "files": _files()}
    save_json(folder / NAME, {**content, "sizes": further})
    return NAME


def _resized(pixels: AppPixels) -> list[dict[str, Any]]:
    """Computed pictures, and some pixels of what they become in one size."""
    height, width = pixels.size
    cases = []
    for number, size in enumerate((*SOURCES, (width, height))):
        fitted = fit(Image.fromarray(source(*size)), (width, height), pixels.strategy, pixels.fill)
        values = np.asarray(fitted)
        places = np.random.default_rng(number).integers(0, (width, height), (SAMPLES, 2))
        samples = [[int(x), int(y), *map(int, values[y, x])] for x, y in places]
        cases.append({"width": size[0], "height": size[1], "samples": samples})
    return cases


def _files() -> list[dict[str, Any]]:
    """Files with what must come of them: size, and RGB row after row, in base64."""
    entries = []
    for name, content in _contents().items():
        rgb = np.asarray(open_image(content))
        entries.append({
            "name": name, "file": base64.b64encode(content).decode(), "width": rgb.shape[1],
            "height": rgb.shape[0], "rgb": base64.b64encode(rgb.tobytes()).decode(),
        })  # fmt: skip
    return entries


def _contents() -> dict[str, bytes]:
    colours = source(24, 16)
    rgb = Image.fromarray(colours)
    alpha = np.dstack([colours, (np.mgrid[:16, :24][1] * 11 % 256).astype(np.uint8)])
    return {
        "plain": _saved(rgb, "PNG"),
        "transparent": _saved(Image.fromarray(alpha), "PNG"),
        "grey": _saved(Image.fromarray(colours[..., 0]), "PNG"),
        "grey of 16 bits": _saved(Image.fromarray(colours[..., 0] * np.uint16(257)), "PNG"),
        "palette": _saved(rgb.quantize(16), "PNG"),
        "Display P3": _saved(rgb, "PNG", icc_profile=display_p3()),
        "on its side": _saved(rgb, "TIFF", tiffinfo={ORIENTATION: 6}),
    }


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def display_p3() -> bytes:
    """An ICC profile: LittleCMS' sRGB with Display P3's primaries."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", *DATE)
    count = int.from_bytes(profile[128:132], "big")
    for index in range(count):
        at = 132 + 12 * index
        name, offset = bytes(profile[at : at + 4]), int.from_bytes(profile[at + 4 : at + 8], "big")
        if name in P3:  # 'XYZ ', four reserved bytes, then s15Fixed16 numbers
            numbers = (round(value * 65536) for value in P3[name])
            profile[offset + 8 : offset + 20] = struct.pack(">3i", *numbers)
    return bytes(profile)
