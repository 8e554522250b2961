"""States that go back to what they were."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kv import CacheGroup, CacheLayout, KVCachePool, RecurrentStateSpec, SavedStates

SPEC = RecurrentStateSpec(64, ((3, 4), (6,)), (mx.float32, mx.float16))


@pytest.fixture
def pool() -> KVCachePool:
    """Two layers, whose states lie in slabs of their own."""
    return KVCachePool(CacheLayout.from_groups([CacheGroup(("a", "b"), SPEC)], 6))


def written(pool: KVCachePool, seed: int, blocks: list[int]) -> list[list[np.ndarray]]:
    """Write random states to some blocks of both layers, and return them."""
    states = []
    for i, name in enumerate(("a", "b")):
        key = mx.random.key(seed + i)
        arrays = [mx.random.normal((len(blocks), *shape), key=key).astype(mx.float16) for shape in SPEC.shapes]
        pool.layer(name).write_states(arrays, mx.array(blocks, mx.int32))
        states.append([np.array(array, np.float32) for array in arrays])
    mx.eval(pool.arrays())
    return states


def read(pool: KVCachePool, block: int) -> list[list[np.ndarray]]:
    ids = mx.array([block], mx.int32)
    return [[np.array(array, np.float32)[0] for array in pool.layer(name).read_states(ids)] for name in ("a", "b")]


def test_states_of_some_requests_go_back(pool: KVCachePool) -> None:
    before = written(pool, 1, [3, 5, 2])
    saved = SavedStates(pool, {0: [3, 5, 2]})
    after = written(pool, 7, [3, 5, 2])
    saved.put_back([2, 0])
    for place, (block, expected) in enumerate([(3, before), (5, after), (2, before)]):
        for got, want in zip(read(pool, block), expected, strict=True):
            for array, values in zip(got, want, strict=True):
                np.testing.assert_array_equal(array, values[place])


def test_nothing_to_put_back(pool: KVCachePool) -> None:
    written(pool, 1, [3])
    saved = SavedStates(pool, {0: [3]})
    after = written(pool, 7, [3])
    saved.put_back([])
    np.testing.assert_array_equal(read(pool, 3)[0][0], after[0][0][0])
