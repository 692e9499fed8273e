"""Values of 4 and 6 bits, packed from the lowest bit on, as MLX and Core ML do."""

import numpy as np


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] -> uint8 [..., 2 n], each byte's low half before its high one."""
    wide = packed.astype("<u2")
    wide |= wide << 4
    wide &= 0x0F0F
    return wide.view(np.uint8)


def sixes(packed: np.ndarray) -> np.ndarray:
    """uint8 [3 n] -> uint8 [4 n] of 6 bits each, lowest bits first."""
    low, middle, high = packed.reshape(-1, 3).T
    values = np.empty((len(low), 4), np.uint8)
    values[:, 0] = low & 63
    values[:, 1] = low >> 6 | (middle & 15) << 2
    values[:, 2] = middle >> 4 | (high & 3) << 4
    values[:, 3] = high >> 2
    return values.reshape(-1)
