"""Photographs from packages: file -> crops for backgrounds and for what the model must decline.

The photographs that evaluate.py shows are in HELD_OUT and never trained on.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageFilter, ImageOps

# Of Debian's packages lomiri-wallpapers and ukui-wallpapers; mate-backgrounds is held out.
WALLPAPERS = Path("/usr/share/backgrounds")
SCIKIT_IMAGE = """
astronaut.png brick.png camera.png cell.png clock_motion.png coffee.png coins.png grass.png
gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg
page.png
"""
LONGEST = 640  # pixels; larger photographs are reduced once


def package_data(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise SystemExit(f"the photographs need {package}: pip install '.[demo]'")
    return Path(spec.origin).parent.joinpath(*parts)


def trained_files() -> list[Path]:
    """Photographs to train on."""
    skimage = package_data("skimage", "data")
    walls = [*WALLPAPERS.glob("*.jpg"), *WALLPAPERS.glob("*.png")]
    return [p for name in SCIKIT_IMAGE.split() if (p := skimage / name).exists()] + sorted(walls)


def held_out_files() -> list[Path]:
    """Photographs that only evaluate.py shows."""
    sklearn, skimage = package_data("sklearn", "datasets", "images"), package_data("skimage")
    grace = package_data("matplotlib", "mpl-data", "sample_data", "grace_hopper.jpg")
    nature = sorted((WALLPAPERS / "mate" / "nature").glob("*.jpg"))
    return [
        *nature, sklearn / "china.jpg", sklearn / "flower.jpg", grace,
        skimage / "data" / "chelsea.png",
    ]  # fmt: skip


def reduced(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    image.thumbnail((LONGEST, LONGEST))
    return image


@cache
def trained() -> tuple[Image.Image, ...]:
    files = trained_files()
    if len(files) < 20:
        raise SystemExit("install the photographs' packages first: fonts.py --packages names them")
    return tuple(reduced(path) for path in files)


def crop(image: Image.Image, rng: Random, width: int, height: int) -> Image.Image:
    """A part of the photograph, perhaps mirrored and with its colours changed."""
    share = rng.uniform(0.3, 1.0)
    w = min(image.width, image.height * width / height) * share
    h = w * height / width
    x, y = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
    part = image.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + w, y + h))
    if rng.random() < 0.5:
        part = ImageOps.mirror(part)
    if rng.random() < 0.15:
        part = ImageOps.flip(part)
    if rng.random() < 0.4:
        bands = list(part.split())
        rng.shuffle(bands)
        part = Image.merge("RGB", bands)
    if rng.random() < 0.4:
        gain, lift = rng.uniform(0.6, 1.3), rng.uniform(-40, 40)
        part = part.point(lambda v: gain * v + lift)
    return part


def texture(rng: Random, width: int, height: int) -> Image.Image:
    """Noise of some grain in random colours: nothing that has a name."""
    noise = np.random.default_rng(rng.getrandbits(32))
    grain = rng.choice((2, 4, 8, 16, 32))
    small = noise.uniform(0, 255, (max(2, height // grain), max(2, width // grain), 3))
    if rng.random() < 0.4:
        small[:] = small[..., :1]
    image = Image.fromarray(small.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.EMBOSS if rng.random() < 0.3 else ImageFilter.SMOOTH)
    return image


def unknown(rng: Random, width: int, height: int) -> Image.Image:
    """A picture that shows nothing the model knows: mostly photographs."""
    if rng.random() < 0.12:
        return texture(rng, width, height)
    return crop(rng.choice(trained()), rng, width, height)
