"""States in pages, read and written by the kernels."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import kernels

STATES = {
    "one": [((3, 40), mx.bfloat16)],
    "two": [((3, 64), mx.float16), ((2, 8, 80), mx.float32)],
    "four": [((2, 8), mx.float32), ((3, 6), mx.float16), ((9,), mx.float32), ((4, 300), mx.bfloat16)],
}


def random(shape, dtype):
    array = mx.array(np.random.default_rng(0).normal(size=shape).astype(np.float32)).astype(dtype)
    mx.eval(array)
    return array


@pytest.mark.parametrize("page_dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("kind", list(STATES))
def test_what_is_written_in_place_is_read(kind, page_dtype):
    shapes, dtypes = zip(*STATES[kind], strict=True)
    content = sum(int(np.prod(shape)) * dtype.size for shape, dtype in STATES[kind])
    half = -(-content // 8) + 3
    pages = random((7, 2, 1, 1, half * 4 // page_dtype.size), page_dtype)
    before = np.array(pages.view(mx.uint8).reshape(7, -1))
    states = [random((2, *shape), dtype) for shape, dtype in STATES[kind]]
    written, token = kernels.scatter_states(pages, mx.array([5, 2]), states)
    assert written is pages
    read = kernels.gather_states(pages, mx.array([2, 5, 2]), shapes, dtypes, token)
    for array, state in zip(read, states, strict=True):
        assert array.dtype == state.dtype
        assert mx.array_equal(array, state[mx.array([1, 0, 1])])
    mx.eval(token)
    after = np.array(pages.view(mx.uint8).reshape(7, -1))
    np.testing.assert_array_equal(after[:, content:], before[:, content:])
    np.testing.assert_array_equal(after[[0, 1, 3, 4, 6]], before[[0, 1, 3, 4, 6]])


def test_states_of_padding_go_nowhere():
    shapes, dtypes = zip(*STATES["two"], strict=True)
    pages = random((7, 2, 1, 1, 2048), mx.float32)
    before = np.array(pages.reshape(7, -1))
    states = [random((3, *shape), dtype) for shape, dtype in STATES["two"]]
    pages, token = kernels.scatter_states(pages, mx.array([5, -1, 2]), states, order_token=states[0])
    read = kernels.gather_states(pages, mx.array([5, 2]), shapes, dtypes, token)
    for array, state in zip(read, states, strict=True):
        assert mx.array_equal(array, state[mx.array([0, 2])])
    np.testing.assert_array_equal(np.array(pages.reshape(7, -1))[[0, 1, 3, 4, 6]], before[[0, 1, 3, 4, 6]])


def test_states_of_odd_bytes_or_too_many_arrays_are_left_to_mlx():
    pages = random((3, 2, 1, 1, 64), mx.float32)
    assert not kernels.move_states(pages, [(9,)], [mx.float16])
    assert not kernels.move_states(pages, [(8,)] * 5, [mx.float32] * 5)
