"""Pictures of different sizes as one array, for models that look at one image in several."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .image import Pixels


@dataclass(frozen=True, eq=False)
class Pieces(Pixels):
    """Each in the upper left of its array, [pieces, H, W, 3]; sizes: (height, width) of each."""

    sizes: tuple[tuple[int, int], ...] = ()


def together(pieces: Sequence[np.ndarray], size: tuple[int, int]) -> Pieces:
    """uint8 [h, w, 3] of several sizes, made of an image of `size` (width, height); zero where a
    piece is smaller than the largest."""
    sizes = tuple((piece.shape[0], piece.shape[1]) for piece in pieces)
    data = np.zeros((len(pieces), *np.max(sizes, axis=0), 3), np.uint8)
    for row, piece in zip(data, pieces, strict=True):
        row[: piece.shape[0], : piece.shape[1]] = piece
    return Pieces(data, size, sizes)


def cut_out(pixels: Pixels) -> list[np.ndarray]:
    """The pieces without what fills their arrays up."""
    data = pixels.data if pixels.data.ndim == 4 else pixels.data[None]
    sizes = pixels.sizes if isinstance(pixels, Pieces) else (data.shape[1:3],) * len(data)
    return [piece[:height, :width] for piece, (height, width) in zip(data, sizes, strict=True)]
