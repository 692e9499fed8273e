"""float32 arrays -> float32 arrays whose every value is a float16."""

import numpy as np

from .operations.elementwise import by_blocks

_SPLIT = np.float32(2**13 + 1)  # x * this, minus itself minus x, keeps 11 of 24 bits (Veltkamp)
_NORMAL = np.float32(2.0**-14)  # below, float16 has steps of 2 ** -24
_SHIFT = np.float32(0.75)  # adding it leaves steps of 2 ** -24 in float32
_OVERFLOW = 65520.0  # from here on float16 rounds to infinity


def _round(x: np.ndarray) -> np.ndarray:
    size = np.abs(x)
    if not float(size.max(initial=0.0)) < _OVERFLOW:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    wide = x * _SPLIT
    y = wide - (wide - x)
    small = size < _NORMAL
    if small.any():
        np.copyto(y, (x + _SHIFT) - _SHIFT, where=small)
    return y


to_half = by_blocks(_round)
