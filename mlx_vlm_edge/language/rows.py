"""Several sequences decoded in one step: the KV caches of each, behind one layer's cache protocol.

Projections and MLPs see all rows at once, [B, 1, D]; attention goes row by row over that row's own
cache. So rows of any lengths and kinds of cache may join and leave between two steps, nothing is
padded or copied, and a row's numbers do not depend on its neighbours' lengths.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .cache import Cache, Mask


class RowCaches:
    """One layer's caches of B sequences, for one new position of each.

    `offset` is int[B], which the rotary positions take row by row.
    """

    def __init__(self, rows: Sequence[Cache]) -> None:
        self.rows = list(rows)

    @property
    def offset(self) -> mx.array:
        return mx.array([row.offset for row in self.rows])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[list[Any], list[Any]]:
        """keys and values [B, kv_heads, 1, head_dim] -> what each row's cache gives."""
        pairs = [
            row.update_and_fetch(keys[index : index + 1], values[index : index + 1])
            for index, row in enumerate(self.rows)
        ]
        return [k for k, _ in pairs], [v for _, v in pairs]

    def make_mask(self, N: int) -> Mask:
        """None: every row's one new position sees all of its own cache."""
        if N != 1:
            raise ValueError(f"rows are decoded one position at a time, not {N}")
        return None

    def is_trimmable(self) -> bool:
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        return min(row.trim(n) for row in self.rows)

    @property
    def state(self) -> list[Any]:
        return [row.state for row in self.rows]


def rows_of(sequences: Sequence[Sequence[Cache]]) -> list[RowCaches]:
    """The caches of B sequences, each one per layer -> one `RowCaches` per layer.

    rows_of([[a0, a1], [b0, b1]]) -> [RowCaches([a0, b0]), RowCaches([a1, b1])]
    """
    return [RowCaches(layer) for layer in zip(*sequences, strict=True)]
