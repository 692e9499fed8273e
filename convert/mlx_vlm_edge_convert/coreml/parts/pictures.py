"""Pictures that a vision package and the MLX model are compared on."""

from pathlib import Path

import numpy as np

from mlx_vlm_edge.picture.image import fit, open_image

from .encoders import Encoder
from .vision import Case


def drawn_cases(encoder: Encoder) -> list[Case]:
    """A drawn picture, and random pixels, which drive activations further than pictures do."""
    picture = _drawn(*encoder.pixels.size)
    return [Case("a drawn picture", picture, encoder), _noise(encoder)]


def picture_cases(encoder: Encoder, image: str | Path) -> list[Case]:
    """The user's picture, and random pixels. Raises UsageError when it cannot be read."""
    pixels = encoder.pixels
    height, width = pixels.size
    fitted = fit(open_image(image), (width, height), pixels.strategy, pixels.fill)
    return [Case("the given picture", np.asarray(fitted), encoder), _noise(encoder)]


def _noise(encoder: Encoder) -> Case:
    shape = (*encoder.pixels.size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Case("random pixels", pixels, encoder)


def _drawn(height: int, width: int) -> np.ndarray:
    """Slopes of colour with rings, a dark disc and a bright bar: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    rings = 128 + 100 * np.sin(40 * (x**2 + y**2))
    picture = np.stack([255 * x, 255 * y, rings], axis=-1)
    picture[(x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.03] = (20, 10, 30)
    picture[(abs(x - 0.75) < 0.05) & (y > 0.1)] = (250, 240, 60)
    return picture.astype(np.uint8)
