"""Pixels as bytes -> floats as a tower takes them: in float32 on the device, whatever comes after.

In bfloat16 1/255 is 0.39 % too large, and so would every pixel be.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..picture.resize import Levels

# CLIP's, SigLIP's and DINOv2's, by which pixels in 0..1 are normalised.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normal(NamedTuple):
    """By what pixels in 0..1 are normalised. fill: the mean as bytes, cut off, which pictures are
    padded with."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill: tuple[int, int, int]


CLIP = Normal(CLIP_MEAN, CLIP_STD, (122, 116, 104))
SIGLIP = Normal(HALF, HALF, (127, 127, 127))
PLAIN = Normal((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0, 0, 0))


def normalized(
    pictures: Levels,
    dtype: mx.Dtype,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> mx.array:
    """uint8 [..., 3] -> (pixel / 255 - mean) / std of the same shape, cast to dtype at the end."""
    scale = mx.array([1 / (255 * deviation) for deviation in std])
    x = mx.array(pictures).astype(mx.float32) * scale
    if any(mean):
        x = x - mx.array([m / deviation for m, deviation in zip(mean, std, strict=True)])
    return x.astype(dtype)
