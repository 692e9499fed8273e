"""Which rows of a position embedding the patches of a smaller or padded picture take.

SigLIP's table is for one size; Idefics3 stretches it over whatever part of a tile is picture.
"""

import numpy as np


def patch_mask(mask: np.ndarray, patch: int) -> np.ndarray:
    """bool [B, H, W], which pixels are picture -> [B, H / patch, W / patch], for whole patches.

    A patch is picture when any pixel of it is. With patch 2, [[1, 1, 1, 0]] * 2 -> [[1, 1]].
    """
    B, H, W = mask.shape
    rows, columns = H // patch, W // patch
    whole = mask[:, : rows * patch, : columns * patch]
    return np.any(whole.reshape(B, rows, patch, columns, patch), axis=(2, 4))


def position_ids(mask: np.ndarray, side: int) -> np.ndarray:
    """bool [B, rows, columns], which patches are picture -> their rows of the position embedding.

    The table's side x side grid is stretched over the picture, N patches wide: patch i takes entry
    i * side // N. With side 4, two patches take entries 0 and 2. Padding takes entry 0.
    """
    B, rows, columns = mask.shape
    high, wide = mask[:, :, 0].sum(1, keepdims=True), mask[:, 0, :].sum(1, keepdims=True)
    down = np.arange(rows)[None] * side // np.maximum(high, 1)
    across = np.arange(columns)[None] * side // np.maximum(wide, 1)
    ids = down[:, :, None] * side + across[:, None, :]
    return np.where(mask, ids, 0).reshape(B, -1)
