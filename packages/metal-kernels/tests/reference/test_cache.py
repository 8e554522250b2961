"""Cache writes, block copies and gathers against NumPy, and how much memory a write takes."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metal_kernels import MetalKernelsError, copy_blocks, gather_kv_cache, reshape_and_cache

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def random_array(rng, shape, dtype=mx.float32):
    return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def as_numpy(array):
    return np.array(array.astype(mx.float32))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    skipped=st.floats(0, 1),
    block_size=st.sampled_from([1, 8, 16]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_row_lands_in_its_slot_and_nothing_else_changes(tokens, skipped, block_size, dtype, seed):
    rng = np.random.default_rng(seed)
    cache = random_array(rng, (50, 2, block_size, 2, 4), dtype)
    key, value = (random_array(rng, (tokens, 2, 4), dtype) for _ in range(2))
    slots = rng.permutation(50 * block_size)[:tokens].astype(np.int32)
    slots[rng.random(len(slots)) < skipped] = -1
    key, value = key[: len(slots)], value[: len(slots)]
    want = as_numpy(cache)
    for row, slot in enumerate(slots):
        if slot >= 0:
            want[slot // block_size, :, slot % block_size] = as_numpy(key)[row], as_numpy(value)[row]
    written, _ = reshape_and_cache(key, value, cache, mx.array(slots))
    np.testing.assert_array_equal(as_numpy(written), want)
    assert written.dtype == dtype


def test_rows_are_stored_in_the_dtype_of_the_cache():
    rows = mx.full((1, 1, 4), 1.001)
    written, _ = reshape_and_cache(rows, rows, mx.zeros((2, 2, 8, 1, 4), mx.bfloat16), mx.array([9]))
    assert written.dtype == mx.bfloat16
    assert written[1, 0, 1, 0, 0].item() == 1.0


@pytest.mark.parametrize("slots", [[3, 900], [-1, 900]])
def test_a_write_takes_no_memory_of_the_size_of_the_cache(slots):
    cache = mx.zeros((4000, 2, 8, 2, 32))
    rows = mx.ones((2, 2, 32))
    mx.eval(cache, rows)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for step in range(3):
        cache, _ = reshape_and_cache(rows, rows, cache, mx.array(np.array(slots) + step, mx.int32))
        seen = cache[0].sum()
        mx.eval(cache, seen)
    assert mx.get_peak_memory() - before < cache.nbytes / 10


def test_blocks_are_copied_all_at_once():
    rng = np.random.default_rng(0)
    cache = random_array(rng, (9, 2, 8, 1, 4))
    before = as_numpy(cache)
    written, _ = copy_blocks(cache, mx.array([1, 2, 3]), mx.array([2, 1, 8]))
    after = before.copy()
    after[[2, 1, 8]] = before[[1, 2, 3]]
    np.testing.assert_array_equal(as_numpy(written), after)


def test_copying_nothing_changes_nothing():
    cache = random_array(np.random.default_rng(0), (3, 2, 8, 1, 4))
    none = mx.zeros((0,), mx.int32)
    assert mx.array_equal(copy_blocks(cache, none, none)[0], cache)


def test_a_block_copy_takes_no_memory_of_the_size_of_the_cache():
    cache = mx.zeros((4000, 2, 8, 2, 32))
    mx.eval(cache)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cache, _ = copy_blocks(cache, mx.array([1, 5]), mx.array([7, 9]))
    mx.eval(cache)
    assert mx.get_peak_memory() - before < cache.nbytes / 10


@pytest.mark.parametrize("seq_len", [0, 1, 8, 19, 24])
def test_gather_returns_positions_in_order(seq_len):
    cache = random_array(np.random.default_rng(0), (9, 2, 8, 3, 4))
    keys, values = gather_kv_cache(cache, mx.array([4, 8, 2]), seq_len)
    flat = as_numpy(cache)[[4, 8, 2]].swapaxes(0, 1).reshape(2, 24, 3, 4)[:, :seq_len]
    np.testing.assert_array_equal(np.stack([as_numpy(keys), as_numpy(values)]), flat)


def test_gather_refuses_more_than_the_blocks_hold():
    with pytest.raises(MetalKernelsError, match="seq_len of 0 to 16"):
        gather_kv_cache(mx.zeros((3, 2, 8, 2, 4)), mx.array([1, 2]), 17)
