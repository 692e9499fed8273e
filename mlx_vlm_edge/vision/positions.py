"""Which rows of a position embedding the patches of a smaller picture take.

SigLIP's table is for one size; Idefics3 stretches it over whatever size its tiles have.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

SHAPES = 64  # of grids whose tables are remembered


@lru_cache(SHAPES)
def positions(rows: int, columns: int, side: int) -> mx.array:
    """`position_ids` as a tower takes them, int[1, rows * columns]; made once for each shape."""
    return mx.array(position_ids(rows, columns, side)[None])


def position_ids(rows: int, columns: int, side: int) -> np.ndarray:
    """Rows of the position embedding for rows x columns patches, int[rows * columns].

    The table's side x side grid is stretched over the picture, N patches wide: patch i takes entry
    i * side // N. With side 4, two patches take entries 0 and 2.
    """
    down = np.arange(rows) * side // rows
    across = np.arange(columns) * side // columns
    ids: np.ndarray = (down[:, None] * side + across).reshape(-1)
    return ids
