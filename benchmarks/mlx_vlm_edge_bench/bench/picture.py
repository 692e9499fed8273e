"""The picture that is asked about when the user gives none: drawn, the same bytes every time."""

import io

SIDE = 1024
SEED = 5
NAME = f"drawn, {SIDE} x {SIDE} JPEG"


def default_picture(side: int = SIDE) -> bytes:
    """A JPEG of side x side pixels with smooth colours and some grain, as a photograph has."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:side, 0:side] / side
    colours = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * (x + y))], axis=-1)
    grain = np.random.default_rng(SEED).normal(0, 0.03, colours.shape)
    pixels = (np.clip(colours + grain, 0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
