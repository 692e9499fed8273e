"""How far one array is from another, in one number."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.vision.pixels import CLIP_MEAN, CLIP_STD, normalized

# Relative distances at which two float32 implementations of the same network count as equal.
# Rounding alone gives up to 4e-6 through the whole tiny tower; the mildest planted fault 7e-4.
FLOAT32 = 2e-5
# In bfloat16 an implementation may be this many times as far from float64 as the original's own
# bfloat16 is (2 % to 7 % through the tiny tower).
BFLOAT16_FACTOR = 1.1
BFLOAT16_STAGE = 1.25  # the same for the first stages of a tower by themselves


def distance(got: Any, want: Any) -> float:
    """Root mean square of the difference, relative to the spread of what was wanted.

    distance([1, 3], [0, 2]) == 1.0
    """
    got, want = (np.array(x, dtype=np.float64) for x in (got, want))
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    assert np.isfinite(got).all(), "not finite"
    return float(np.sqrt(np.mean((got - want) ** 2)) / want.std())


def clip_pixels(data: np.ndarray) -> mx.array:
    """uint8 pixels as CLIP's towers take them, in float32."""
    return normalized(data, mx.float32, CLIP_MEAN, CLIP_STD)
