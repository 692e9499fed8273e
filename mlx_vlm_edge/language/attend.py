"""Queries and what a cache gave for them -> attention, in the form that the kind of cache needs."""

from typing import Any

import mlx.core as mx

from ..kernels import attention
from .cache import Cache, Mask, QuantizedKVCache, causal_mask
from .rows import RowCaches


def attend(q: mx.array, k: Any, v: Any, cache: Cache | None, scale: float, mask: Mask) -> mx.array:
    """Attention of q [B, heads, L, D] over what `cache.update_and_fetch` gave.

    q may be the last few only of the positions that the mask is for.
    """
    if isinstance(cache, RowCaches):
        rows = zip(mx.split(q, len(cache.rows)), k, v, cache.rows, strict=True)
        return mx.concatenate([attend(*row, scale, None) for row in rows])
    if isinstance(mask, mx.array):
        mask = mask[..., -q.shape[2] :, :]
    if isinstance(cache, QuantizedKVCache):
        return _attend_quantized(q, k, v, cache, scale, mask)
    return attention(q, k, v, scale, mask)


def _attend_quantized(
    q: mx.array, k: Any, v: Any, cache: QuantizedKVCache, scale: float, mask: Mask
) -> mx.array:
    B, heads, L, D = q.shape
    kv_heads = k[0].shape[1]
    grouped = (q * scale).reshape(B, kv_heads, heads // kv_heads, L, D)
    scores = _matmul(grouped, k, cache, transpose=True)
    if mask is not None:
        length = k[0].shape[2]
        visible = causal_mask(L, length - L, length) if isinstance(mask, str) else mask
        scores = mx.where(visible, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return _matmul(weights, v, cache, transpose=False).reshape(B, heads, L, D)


def _matmul(x: mx.array, packed: Any, cache: QuantizedKVCache, transpose: bool) -> mx.array:
    """x [B, kv_heads, queries per kv head, L, n] times a quantised [B, kv_heads, S, D]."""
    w, scales, biases = (part[:, :, None] for part in packed)
    return mx.quantized_matmul(
        x, w, scales, biases, transpose, group_size=cache.group_size, bits=cache.bits
    )
