"""A language model alone -> the work of a prompt of so many positions, and of a token after it."""

from typing import Any

import mlx.core as mx

from mlx_vlm_edge.language.decoder import PREFILL_STEP
from mlx_vlm_edge.loading.counting import Work, counted


def prompt_work(language_model: Any, positions: int) -> tuple[Work, Work]:
    """Prefill and the next step, on shapes alone."""
    cache = language_model.make_cache()
    width, dtype = language_model.config.hidden_size, language_model.model.norm.weight.dtype

    def work(length: int) -> Work:
        embeddings = mx.zeros((1, length, width), dtype)
        return counted(lambda: language_model(embeddings, cache, last_only=True))

    lengths = [min(PREFILL_STEP, positions - start) for start in range(0, positions, PREFILL_STEP)]
    prefill = sum(map(work, lengths), Work())
    return prefill, work(1)
