"""What a piece of a test takes of MLX's memory, whatever other tests' arrays still hold."""

import gc

import mlx.core as mx


class Peak:
    """bytes: the most at once since this was made, beyond what was there already."""

    def __init__(self) -> None:
        gc.collect()
        mx.synchronize()
        mx.reset_peak_memory()
        self._before = mx.get_active_memory()

    @property
    def bytes(self) -> int:
        return mx.get_peak_memory() - self._before
