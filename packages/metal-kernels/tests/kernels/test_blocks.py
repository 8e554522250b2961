"""Block copies and gathers by the kernels against NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import kernels

SHAPES = [(9, 2, 8, 2, 64), (9, 2, 16, 1, 1), (9, 2, 1, 1, 80)]


def pages(shape, dtype):
    array = mx.array(np.random.default_rng(0).normal(size=shape).astype(np.float32)).astype(dtype)
    mx.eval(array)
    return array


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_copied_all_at_once_and_in_place(shape, dtype):
    cache = pages(shape, dtype)
    want = np.array(cache.astype(mx.float32))
    want[[2, 1, 8]] = want[[1, 2, 3]]
    written, token = kernels.copy_blocks(cache, mx.array([1, 2, 3]), mx.array([2, 1, 8]), order_token=mx.zeros(8))
    mx.eval(token)
    assert written is cache
    np.testing.assert_array_equal(np.array(cache.astype(mx.float32)), want)


@pytest.mark.parametrize("ids", [[4], [8, 0, 8], list(range(9))], ids=len)
def test_gathered_blocks(ids):
    cache = pages(SHAPES[0], mx.float16)
    gathered = kernels.gather_blocks(cache, mx.array(ids), None)
    assert mx.array_equal(gathered, cache[mx.array(ids)])


def test_nothing_to_copy_or_gather():
    cache, none = pages(SHAPES[0], mx.float32), mx.zeros((0,), mx.int32)
    assert kernels.copy_blocks(cache, none, none)[0] is cache
    assert kernels.gather_blocks(cache, none, None).shape == (0, *SHAPES[0][1:])
