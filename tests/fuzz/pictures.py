"""Pictures: spoiled files of every format, and sound ones of odd sizes and modes."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture import tiling
from mlx_vlm_edge.picture.image import fit, open_image
from mlx_vlm_edge.picture.video import Video, read_video

from .harness import Attempt
from .mutate import spoiled

FORMS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "QOI", "SGI",
         "AVIF", "JPEG2000", "HEIF", "DDS", "EPS", "MPO", "PDF")  # fmt: skip
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "YCbCr", "LAB", "HSV", "La", "PA")
GRIDS = [(64 * a, 64 * b) for a in range(1, 4) for b in range(1, 4)]


def prepare(folder: Path) -> Attempt:
    try:
        import pi_heif

        pi_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    hostile = Path(__file__).parents[1] / "picture" / "hostile"
    small = [path for path in hostile.iterdir() if path.name in ("eps_named.jpg", "56x43048.gif")]
    seeds = [path.read_bytes() for path in small] + list(_seeds())
    path = folder / "picture"

    def attempt(rng: random.Random) -> None:
        chance = rng.random()
        if chance < 0.15:
            _sound(rng)
            return
        content = spoiled(rng.choice(seeds), rng)
        if chance < 0.25:
            path.write_bytes(content)
            clip = read_video(Video(path), 2.0, 8)
            assert clip.frames
            assert all(frame.mode == "RGB" for frame in clip.frames)
            return
        path.write_bytes(content)
        _used(open_image(rng.choice((content, path))), rng)

    return attempt


def _seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 33, 4), np.uint8)
    rgba = Image.fromarray(pixels)
    found = []
    for form in FORMS:
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16"):
            for extra in ({}, {"save_all": True, "append_images": [rgba.convert("RGB")] * 2}):
                picture = Image.new("I;16", (33, 24)) if mode == "I;16" else rgba.convert(mode)
                buffer = io.BytesIO()
                try:
                    picture.save(buffer, form, **extra)
                except (OSError, KeyError, ValueError, TypeError, RuntimeError):
                    continue
                found.append(buffer.getvalue())
    assert len(found) > 50
    return found


def _sound(rng: random.Random) -> None:
    """A picture that is nothing but odd must be read, at its own size."""
    long = rng.choice((1, 2, 7, 33, 500, 4000))
    size = rng.choice(((long, rng.randint(1, 40)), (rng.randint(1, 40), long)))
    mode = rng.choice(MODES)
    picture = Image.new(mode, size)
    image = open_image(picture)
    assert image.size == size
    _used(image, rng)


def _used(image: Image.Image, rng: random.Random) -> None:
    assert image.mode == "RGB"
    assert min(image.size) > 0
    side = rng.choice((32, 56, 64))
    for strategy in ("pad", "center_crop", "stretch"):
        fitted = fit(image, (side, side), strategy, (122, 116, 104))
        assert fitted.size == (side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            tiles = tiling.split(image, 256, 64)
            assert tiles.shape[1:] == (64, 64, 3)
            assert tiling.anyres_tiles(image, 64, GRIDS).shape[1:] == (64, 64, 3)
        except UsageError:
            return
