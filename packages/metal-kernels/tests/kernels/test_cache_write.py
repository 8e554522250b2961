"""The write kernel changes the cache itself, exactly as its twin changes a copy."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import kernels, reference

FLOATS = [mx.float32, mx.float16, mx.bfloat16]


def random_array(rng, shape, dtype=mx.float32):
    array = mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    mx.eval(array)
    return array


def check(key, value, cache, slots):
    want, _ = reference.reshape_and_cache(key, value, mx.array(np.array(cache.astype(mx.float32))), mx.array(slots))
    written, token = kernels.reshape_and_cache(key, value, cache, mx.array(slots))
    mx.eval(token)
    assert written is cache
    assert mx.array_equal(cache.astype(mx.float32), want.astype(cache.dtype).astype(mx.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("slots", [[9], [3, -1, 30, 17], [-1, -1], list(range(39, 7, -1))], ids=len)
def test_each_row_lands_in_its_slot_and_nothing_else_changes(dtype, slots):
    rng = np.random.default_rng(0)
    rows = [random_array(rng, (len(slots), 3, 80), dtype) for _ in range(2)]
    check(*rows, random_array(rng, (5, 2, 8, 3, 80), dtype), np.array(slots, np.int32))


def test_one_element_per_row():
    rng = np.random.default_rng(1)
    rows = [random_array(rng, (1, 1, 1)) for _ in range(2)]
    check(*rows, random_array(rng, (2, 2, 8, 1, 1)), np.array([11], np.int32))


def test_rows_that_are_views_of_a_larger_array():
    rng = np.random.default_rng(2)
    joined = random_array(rng, (5, 6, 64))
    key, value = joined[:, 2:4], joined.swapaxes(0, 1)[4:].swapaxes(0, 1)
    check(key, value, random_array(rng, (3, 2, 8, 2, 64)), np.array([8, 20, 9, -1, 23], np.int32))


def test_rows_of_another_dtype_are_converted():
    rng = np.random.default_rng(3)
    rows = [random_array(rng, (2, 1, 64)) for _ in range(2)]
    check(*rows, random_array(rng, (3, 2, 8, 1, 64), mx.bfloat16), np.array([8, 20], np.int32))


def test_no_rows():
    cache, none = mx.zeros((2, 2, 8, 1, 64)), mx.zeros((0,), mx.int32)
    written, token = kernels.reshape_and_cache(mx.zeros((0, 1, 64)), mx.zeros((0, 1, 64)), cache, none)
    assert written is cache
    assert token.size == 0


def test_writes_are_seen_in_order():
    assert kernels.writes_in_place()
