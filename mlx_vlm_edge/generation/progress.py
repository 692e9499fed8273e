"""How far a prompt is, from the steps that are told of as they end; another thread may ask."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..kernels import on_cpu


class Progress:
    """`text` says what is being done: "encoding picture 2 of 3", "prefill 1,024 of 7,401".

    A step ends before it is computed, so image features are waited for here: where there are
    several of them, or on a CPU, where that costs nothing.
    """

    def __init__(self) -> None:
        self._pictures = self._encoded = self._tiles = 0
        self._waiting: list[int] = []  # tiles of each picture that is not encoded yet
        self._start = self._length = self._step = self._chunks = 0

    @property
    def text(self) -> str:
        if not self._length:
            return "reading the prompt"
        if self._encoded < self._pictures and not self._chunks:
            return f"encoding picture {self._encoded + 1} of {self._pictures}"
        done = self._start + max(self._chunks - 1, 0) * self._step
        return f"prefill {done:,} of {self._length:,}"

    def expect(self, pictures: Sequence[Any], start: int, length: int, step_size: int) -> None:
        """Of a prompt of `length` positions, those from `start` on are computed."""
        arrays = [pixels.data for pixels in pictures]
        self._waiting = [len(array) if array.ndim == 4 else 1 for array in arrays]
        self._pictures, self._encoded, self._tiles = len(arrays), 0, sum(self._waiting)
        self._start, self._length, self._step, self._chunks = start, length, step_size, 0

    def __call__(self, name: str, outcome: Any) -> None:
        if name == "vision" and self._waiting:
            if self._tiles > 1 or on_cpu():
                mx.eval(outcome)
            self._waiting[0] -= outcome.shape[0] if self._waiting[0] > 1 else 1
            if self._waiting[0] <= 0:
                self._waiting.pop(0)
                self._encoded += 1
        elif name == "prefill":
            self._chunks += 1
