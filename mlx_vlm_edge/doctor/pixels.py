"""The bytes that models see, compared on this machine with Pillow's: JPEGs decoded into an array,
pictures resized on each device."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from ..errors import UsageError
from ..picture import imageio, jpeg
from ..picture.device import DeviceImage, decoded
from ..picture.resize import fit, resized
from ..wording import first_line

SIZE, TARGET, FILL = (413, 267), (96, 96), (122, 116, 104)
NEAR = 2.0  # levels of 255, on average, that another decoder may be off
Check = tuple[str, bool | None, str]


class Place(Protocol):
    """Where operations run; see selftest.py."""

    @property
    def name(self) -> str: ...

    def chosen(self) -> AbstractContextManager[None]: ...


def pictures(places: Sequence[Place]) -> Iterator[Check]:
    """A name, whether every byte is Pillow's (None: could not be asked) and a line about it."""
    from PIL import Image
    from PIL.Image import Resampling

    picture = Image.fromarray(_drawn())
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90)
    yield _decoded(content.getvalue())
    yield _by_imageio(content.getvalue())

    def ways(image: Any) -> dict[str, Any]:
        return {
            "padded": fit(image, TARGET, "pad", FILL),
            "cropped": fit(image, TARGET, "center_crop"),
            "by Lanczos": resized(image, (SIZE[0] * 2, SIZE[1] // 3), Resampling.LANCZOS),
            "by a bilinear filter": resized(image, TARGET, Resampling.BILINEAR),
        }

    wanted = {name: np.asarray(image) for name, image in ways(picture).items()}
    for place in places:

        def computed(place: Place = place) -> dict[str, np.ndarray]:
            with place.chosen():
                there = ways(DeviceImage.of(picture))
                return {name: np.array(image.data) for name, image in there.items()}

        yield _judged(f"pictures resized ({place.name})", computed, wanted)


def _drawn() -> np.ndarray:
    """Waves and noise, uint8, the same ones every time."""
    width, height = SIZE
    waves = np.sin(np.arange(width) / 11) * 70 + np.cos(np.arange(height) / 7)[:, None] * 50 + 128
    noise = np.random.default_rng(1).normal(0, 25, (height, width, 3))
    return (waves[..., None] + noise).clip(0, 255).astype(np.uint8)


def _decoded(content: bytes) -> Check:
    from PIL import Image

    name = "a JPEG decoded into an array"
    if find_spec("simplejpeg") is None:
        return name, None, "simplejpeg is not installed: Pillow decodes"
    image = Image.open(io.BytesIO(content))

    def computed() -> dict[str, np.ndarray]:
        host, there = jpeg.pillow_image(content, image), decoded(content, image)
        if host is None or there is None:
            raise UsageError("it was not decoded: reinstall simplejpeg")
        return {"on the host": np.asarray(host), "on the device": np.array(there.data)}

    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return _judged(name, computed, {"on the host": pixels, "on the device": pixels})


def _by_imageio(content: bytes) -> Check:
    """On a Mac, whether ImageIO's pixels are near enough to be an option."""
    from PIL import Image

    name = "a JPEG by ImageIO"
    lack = imageio.lacking()
    if lack is not None:
        return name, None, lack
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    levels = np.zeros_like(pixels)
    if not imageio.decode(content, levels):
        return name, False, "it was not decoded"
    off = np.abs(levels.astype(int) - pixels)
    if not off.any():
        return name, True, "every byte is Pillow's"
    said = f"off by {off.mean():.2f} levels on average, at most {off.max()}"
    return name, bool(off.mean() <= NEAR), f"{said}; {NEAR:g} are taken"


def _judged(
    name: str, compute: Callable[[], dict[str, np.ndarray]], wanted: dict[str, np.ndarray]
) -> Check:
    try:
        found = compute()
    except (RuntimeError, ValueError, UsageError) as error:
        return name, False, first_line(error)
    off = [way for way, pixels in wanted.items() if not np.array_equal(found[way], pixels)]
    return name, not off, f"other bytes: {', '.join(off)}" if off else "every byte is Pillow's"
