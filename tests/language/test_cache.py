"""The caches against mlx-lm's: same contents, masks, offsets, trimming and saved state."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.attend import attend
from mlx_vlm_edge.language.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    causal_mask,
)

from ..parity import FLOAT32, distance

PEER = pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")
MAKE = {
    "plain": lambda module: module.KVCache(),
    "8 bits": lambda module: module.QuantizedKVCache(64, 8),
    "4 bits": lambda module: module.QuantizedKVCache(32, 4),
    "rotating": lambda module: module.RotatingKVCache(16, 4),
    "rotating, long": lambda module: module.RotatingKVCache(300, 0),
}
LENGTHS = {
    "one by one": [1] * 40,
    "prompt, then one by one": [10, *[1] * 30],
    "over a step": [250, 1, 1, 10, 1, 300, 1, 1],
    "long prompt": [40, 1, 1, 1],
    "two turns": [9, 1, 1, 9, 1, 1, 1, 12, *[1] * 20],
}


class OURS:
    KVCache, QuantizedKVCache, RotatingKVCache = KVCache, QuantizedKVCache, RotatingKVCache


def update(length: int, seed: int) -> tuple[mx.array, mx.array]:
    """Keys and values [1, 2, length, 64]."""
    random = np.random.default_rng(seed)
    return tuple(mx.array(random.normal(size=(1, 2, length, 64)).astype(np.float32)) for _ in "kv")


def same(got, want) -> None:
    got, want = tree_flatten(got), tree_flatten(want)
    assert [name for name, _ in got] == [name for name, _ in want]
    for (name, a), (_, b) in zip(got, want, strict=True):
        if isinstance(b, mx.array):
            assert a.shape == b.shape, name
            assert a.dtype == b.dtype, name
            assert mx.array_equal(a, b), name
        else:
            assert a == b, name


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", MAKE)
def test_same_as_mlx_lm(kind, lengths):
    ours, theirs = MAKE[kind](OURS), MAKE[kind](PEER)
    for step, length in enumerate(LENGTHS[lengths]):
        same(
            ours.update_and_fetch(*update(length, step)),
            theirs.update_and_fetch(*update(length, step)),
        )
        assert ours.offset == theirs.offset
        assert ours.is_trimmable() == theirs.is_trimmable()


@pytest.mark.parametrize("kind", MAKE)
def test_the_state_goes_to_mlx_lm_and_back(kind):
    ours, theirs = MAKE[kind](OURS), MAKE[kind](PEER)
    for step, length in enumerate([7, 1, 1]):
        ours.update_and_fetch(*update(length, step))
        theirs.update_and_fetch(*update(length, step))
    same(ours.state, theirs.state)
    there = type(theirs).from_state(ours.state)
    back = MAKE[kind](OURS)
    back.state = there.state
    same(back.update_and_fetch(*update(1, 9)), theirs.update_and_fetch(*update(1, 9)))


def test_a_cache_saved_here_opens_in_mlx_lm(tmp_path):
    caches = [KVCache(), KVCache()]
    for index, cache in enumerate(caches):
        cache.update_and_fetch(*update(5, index))
    path = str(tmp_path / "cache.safetensors")
    PEER.save_prompt_cache(path, caches)
    for index, cache in enumerate(PEER.load_prompt_cache(path)):
        same(cache.keys_and_values(), update(5, index))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("count", [0, 3, 100])
def test_trimming(kind, count):
    ours, theirs = MAKE[kind](OURS), MAKE[kind](PEER)
    for cache in (ours, theirs):
        cache.update_and_fetch(*update(8, 0))
    assert ours.trim(count) == theirs.trim(count)
    same(ours.update_and_fetch(*update(2, 1)), theirs.update_and_fetch(*update(2, 1)))
    assert ours.offset == theirs.offset


@pytest.mark.parametrize("start", [0, 3, 12, 20])
@pytest.mark.parametrize("length", [1, 2, 5, 30])
@pytest.mark.parametrize("kind", ["plain", "8 bits", "rotating, long", "rotating, nothing kept"])
def test_masks(kind, start, length):
    make = MAKE.get(kind, lambda module: module.RotatingKVCache(16, 0))
    ours, theirs = make(OURS), make(PEER)
    if start:
        ours.update_and_fetch(*update(start, 0))
        theirs.update_and_fetch(*update(start, 0))
    got = ours.make_mask(length)
    want = theirs.make_mask(length, return_array=False, window_size=None)
    if isinstance(want, mx.array):
        assert mx.array_equal(got, want)
    else:
        assert got == want


def test_kept_positions_stay_visible_to_a_long_prompt():
    """max 8, keep 3, 8 seen, 4 new: buffer 0 1 2 | 4 5 6 7 | 8 9 10 11 after evicting 3."""
    cache = RotatingKVCache(8, 3)
    cache.update_and_fetch(*update(8, 0))
    mask = np.array(cache.make_mask(4)).astype(int)
    assert mask.tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    keys, _ = cache.update_and_fetch(*update(4, 1))
    assert keys.shape[2] == 11
    assert mx.array_equal(keys[:, :, :3], update(8, 0)[0][:, :, :3])
    assert mx.array_equal(keys[:, :, 3:7], update(8, 0)[0][:, :, 4:])


def test_causal_mask_by_hand():
    assert np.array(causal_mask(2, 1, 2)).astype(int).tolist() == [[1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 6])
def test_quantised_attention_is_attention_over_the_rounded_cache(bits, length):
    cache = QuantizedKVCache(64, bits)
    cache.update_and_fetch(*update(5, 0))
    mask = cache.make_mask(length)
    keys, values = cache.update_and_fetch(*update(length, 1))
    q = mx.random.normal((1, 4, length, 64), key=mx.random.key(2))
    got = attend(q, keys, values, cache, 0.125, mask)
    k, v = (mx.dequantize(*part, group_size=64, bits=bits) for part in (keys, values))
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=mask)
    assert distance(got, want) < FLOAT32


def test_quantising_a_plain_cache_keeps_its_positions():
    plain = KVCache()
    keys, _ = plain.update_and_fetch(*update(20, 0))
    quantised = plain.to_quantized(64, 8)
    assert quantised.offset == 20
    assert KVCache().to_quantized().offset == 0
    got, _ = quantised.update_and_fetch(*update(1, 1))
    restored = mx.dequantize(*got, group_size=64, bits=8)
    assert distance(restored[:, :, :20], keys) < 0.01


def test_a_head_that_fits_no_group_is_refused():
    cache = QuantizedKVCache(64, 8)
    with pytest.raises(UsageError, match=r"80.*64"):
        cache.update_and_fetch(mx.zeros((1, 2, 3, 80)), mx.zeros((1, 2, 3, 80)))


def test_a_rotating_cache_must_have_room_beside_what_it_keeps():
    with pytest.raises(UsageError, match="max-kv-size 9"):
        RotatingKVCache(9, 9)
