"""Caches under any order of updates and trims, against a plain list of what was put in."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_vlm_edge.language.attend import attend
from mlx_vlm_edge.language.cache import KVCache, QuantizedKVCache, RotatingKVCache

# A positive number puts so many positions in, a negative one trims as many.
STEPS = st.lists(
    st.one_of(st.integers(1, 9), st.just(1), st.integers(-5, -1), st.just(300)),
    min_size=1, max_size=25,
)  # fmt: skip
laws = settings(max_examples=60, deadline=None, derandomize=True)


def positions(start, length):
    """Keys and values [1, 1, length, 32] that say which position they are of."""
    numbers = mx.arange(start, start + length).astype(mx.float32)
    keys = mx.broadcast_to(numbers[None, None, :, None], (1, 1, length, 32))
    return keys, -keys


def read(array):
    return np.array(array)[0, 0, :, 0].tolist()


@laws
@given(STEPS)
def test_a_plain_cache_is_a_list(steps):
    cache, wanted, put = KVCache(), [], 0
    for step in steps:
        if step < 0:
            assert cache.trim(-step) == min(-step, len(wanted))
            wanted = wanted[:step]
        else:
            keys, values = cache.update_and_fetch(*positions(put, step))
            wanted += [float(number) for number in range(put, put + step)]
            put += step
            assert read(keys) == wanted
            assert read(values) == [-number for number in wanted]
        assert cache.offset == len(wanted)


@laws
@given(STEPS, st.integers(2, 40), st.data())
def test_a_rotating_cache_keeps_the_first_and_the_last(steps, size, data):
    """And is a plain one as long as nothing had to go."""
    keep = data.draw(st.integers(0, size - 1))
    cache, plain, put = RotatingKVCache(size, keep), KVCache(), 0
    for step in steps:
        if step < 0:
            if cache.is_trimmable():
                assert cache.trim(-step) == plain.trim(-step)
            continue
        new = positions(put, step)
        put += step
        mask = cache.make_mask(step)
        seen = read(cache.update_and_fetch(*new)[0])
        whole = read(plain.update_and_fetch(*new)[0])
        assert cache.offset == plain.offset == len(whole)
        assert set(seen) <= set(whole)
        assert set(whole[:keep]) <= set(seen)
        recent = whole[-1:] if step > 1 else whole[max(keep, len(whole) - (size - keep)) :]
        assert set(recent) <= set(seen)
        if len(whole) <= size:
            assert seen == whole
        elif step == 1:
            assert len(seen) == size
        elif isinstance(mask, mx.array):
            assert mask.shape == (step, len(seen))
            assert np.array(mask)[-1].sum() >= min(size, len(whole))


@settings(laws, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_what_is_trimmed_was_never_there(before, wrong, after, seed):
    """Attention over a cache that was trimmed is that over one which never had those positions."""
    random = np.random.default_rng(seed)

    def update(length):
        return [mx.array(random.normal(size=(1, 2, length, 32)).astype("f")) for _ in "kv"]

    first, gone, last = update(before), update(wrong), update(after)
    queries = mx.array(random.normal(size=(1, 4, after, 32)).astype("f"))
    for make in (KVCache, lambda: QuantizedKVCache(32, 8), lambda: RotatingKVCache(64, 4)):
        trimmed, clean = make(), make()
        for part in (first, gone):
            trimmed.update_and_fetch(*part)
        clean.update_and_fetch(*first)
        assert trimmed.trim(wrong) == wrong
        outcomes = []
        for cache in (trimmed, clean):
            mask = cache.make_mask(after)
            outcomes.append(attend(queries, *cache.update_and_fetch(*last), cache, 0.2, mask))
        assert np.array_equal(*map(np.array, outcomes))
