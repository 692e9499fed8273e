"""Pictures of different sizes as one array, for models that look at one image in several."""

from collections.abc import Sequence
from dataclasses import dataclass

from .image import Pixels
from .resize import Levels, joined, padded


@dataclass(frozen=True, eq=False)
class Pieces(Pixels):
    """Each in the upper left of its array, [pieces, H, W, 3]; sizes: (height, width) of each."""

    sizes: tuple[tuple[int, int], ...] = ()


def together(pieces: Sequence[Levels], size: tuple[int, int]) -> Pieces:
    """uint8 [h, w, 3] of several sizes, made of an image of `size` (width, height); zero where a
    piece is smaller than the largest."""
    sizes = tuple((piece.shape[0], piece.shape[1]) for piece in pieces)
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    data = joined(
        [padded(one, width - one.shape[1], height - one.shape[0], 0)[None] for one in pieces]
    )
    return Pieces(data, size, sizes)


def cut_out(pixels: Pixels) -> list[Levels]:
    """The pieces without what fills their arrays up."""
    data = pixels.data if pixels.data.ndim == 4 else pixels.data[None]
    sizes = pixels.sizes if isinstance(pixels, Pieces) else (data.shape[1:3],) * len(data)
    return [piece[:height, :width] for piece, (height, width) in zip(data, sizes, strict=True)]
