"""Visual tokens [N, D] of a picture -> fewer of them, in their order.

What is left of which block was decided with the prompt (`picture/token_budget.py`); here is which
tokens these are (choosing.py) or what they are made of (pooling.py).
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..picture.token_budget import Reduction
from .choosing import by_distance, by_volume, chosen, random
from .pooling import pooled

CHOOSING: dict[str, Callable[[mx.array, Reduction], np.ndarray]] = {
    "divprune": lambda tokens, plan: chosen(tokens, plan, by_distance),
    "dpp": lambda tokens, plan: chosen(tokens, plan, by_volume),
    "random": random,
}
METHODS = (*CHOOSING, "pool")


def places(tokens: mx.array, reduction: Reduction) -> np.ndarray:
    """int32[K]: which of [N, D] a reduction leaves that makes no new tokens.

    "divprune" and "dpp" wait for the device once, for the similarities of all pairs: one product of
    matrices there and a search here cost less than a launch for every token. The others never wait.
    """
    return CHOOSING[reduction.method](tokens, reduction)


def reduced(tokens: mx.array, reduction: Reduction) -> mx.array:
    """Visual tokens [N, D] -> those that a picture's reduction leaves, [K, D]."""
    if reduction.method == "pool":
        return pooled(tokens, reduction)
    return tokens[mx.array(places(tokens, reduction))]
