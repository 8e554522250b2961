"""Decode steps read kept rows as they would read pages."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch, reference
from metal_kv import AttentionMetadata, CacheGroup, CacheLayout, FullAttentionSpec, KVCachePool
from metal_kv.kept_rows import DecodeRuns

BLOCK_SIZE, KV_HEADS, Q_HEADS, HEAD_SIZE = 4, 2, 4, 8


class Layer:
    """One attention layer, whose every step is compared with attention over its pages."""

    def __init__(self, num_blocks: int = 120, dtype: mx.Dtype = mx.float32) -> None:
        spec = FullAttentionSpec(BLOCK_SIZE, KV_HEADS, HEAD_SIZE, dtype=dtype)
        self.pool = KVCachePool(CacheLayout.from_groups([CacheGroup(("a",), spec)], num_blocks))
        self.cache = self.pool.layer("a")
        self.seed = 0

    def step(self, table: list[list[int]], query_lens: list[int], seq_lens: list[int], **options: object) -> None:
        width = max(map(len, table))
        padded = np.array([row + [0] * (width - len(row)) for row in table], np.int32)
        metadata = AttentionMetadata.build(np.cumsum([0, *query_lens]), seq_lens, padded, BLOCK_SIZE)
        self.seed += 1
        tokens, random = metadata.num_tokens, mx.random.key(self.seed)
        rows = mx.random.normal((tokens, Q_HEADS + 2 * KV_HEADS, HEAD_SIZE), key=random)
        query, key, value = mx.split(rows, [Q_HEADS, Q_HEADS + KV_HEADS], axis=1)
        token = self.cache.write(key, value, metadata)
        given = self.cache.attend(query, metadata, scale=0.3, order_token=token, key=key, value=value, **options)
        mx.eval(given, self.pool.arrays())
        window = options.pop("sliding_window", None)
        expected = reference.paged_attention(
            query, self.cache.kv_cache, metadata.batch, scale=0.3, sliding_window=window, **options
        )
        np.testing.assert_allclose(np.array(given), np.array(expected), rtol=1e-5, atol=1e-5)


def blocks(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0}, {"sinks": mx.array([0.5, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_decode_steps_in_a_row(options: dict[str, object], dtype: mx.Dtype) -> None:
    layer = Layer(dtype=dtype)
    table = [blocks(1, 30), blocks(31, 30), blocks(61, 30)]
    layer.step(table, [9, 7, 8], [9, 7, 8])
    for step in range(1, 80):
        layer.step(table, [1, 1, 1], [9 + step, 7 + step, 8 + step], **options)


def test_blocks_come_as_they_are_needed() -> None:
    layer = Layer()
    layer.step([blocks(1, 2), blocks(41, 2)], [6, 5], [6, 5])
    for step in range(1, 40):
        lens = [6 + step, 5 + step]
        table = [blocks(first, -(-length // BLOCK_SIZE)) for first, length in zip((1, 41), lens, strict=True)]
        layer.step(table, [1, 1], lens)


def test_requests_come_go_and_change_places() -> None:
    layer = Layer()
    first, second, third = blocks(1, 6), blocks(7, 6), blocks(13, 6)
    layer.step([first, second], [5, 6], [5, 6])
    for step in (1, 2, 3):
        layer.step([first, second], [1, 1], [5 + step, 6 + step])
    layer.step([first, second, third], [1, 1, 7], [9, 10, 7])  # a prompt beside them
    layer.step([first, second, third], [1, 1, 1], [10, 11, 8])
    layer.step([third, first, second], [1, 1, 1], [9, 11, 12])
    layer.step([third, first, second], [1, 1, 1], [10, 12, 13])
    layer.step([third, first], [1, 1], [11, 13])
    layer.step([third, first], [1, 1], [12, 14])
    layer.step([third, second], [1, 7], [13, 7])  # the second starts anew, in the blocks that it had
    layer.step([third, second], [1, 1], [14, 8])
    layer.step([third, second], [1, 1], [15, 9])


def test_another_request_in_the_same_blocks_and_of_the_same_length() -> None:
    layer = Layer()
    own = blocks(1, 6)
    layer.step([own], [6], [6])
    for length in (7, 8, 9):
        layer.step([own], [1], [length])
    layer.step([own], [9], [9])
    layer.step([own], [1], [10])
    layer.step([own], [1], [11])


def test_blocks_written_by_something_else() -> None:
    layer = Layer()
    own = blocks(1, 6)
    layer.step([own, blocks(7, 6)], [6, 6], [6, 6])
    for length in (7, 8):
        layer.step([own, blocks(7, 6)], [1, 1], [length, length])
    layer.pool.copy_blocks([(7, 1)])
    layer.step([own, blocks(7, 6)], [1, 1], [9, 9])
    layer.step([own, blocks(7, 6)], [1, 1], [10, 10])
    layer.pool.zero_blocks([2])
    layer.step([own, blocks(7, 6)], [1, 1], [11, 11])
    layer.cache.update(lambda pages: pages * 2)
    layer.step([own, blocks(7, 6)], [1, 1], [12, 12])
    layer.step([own, blocks(7, 6)], [1, 1], [13, 13])
    layer.pool.reset()
    layer.step([own, blocks(7, 6)], [1, 1], [14, 14])
    layer.step([own, blocks(7, 6)], [1, 1], [15, 15])


def test_window_shorter_than_the_context() -> None:
    layer = Layer()
    layer.step([blocks(1, 6)], [3], [3])
    for length in range(4, 16):
        layer.step([blocks(1, 6)], [1], [length], sliding_window=8)


def decode(seq_lens: list[int], table: list[list[int]]) -> RaggedBatch:
    starts = np.arange(len(seq_lens) + 1, dtype=np.int32)
    return RaggedBatch(starts, np.array(seq_lens, np.int32), np.array(table, np.int32))


def test_runs() -> None:
    runs = DecodeRuns(row_bytes=1 << 10, pool_bytes=0)
    first = runs.at(decode([5, 6], [[1, 2], [3, 4]]))
    assert first is not None
    assert first[1] == 0
    step = decode([6, 7], [[1, 2], [3, 4]])
    assert runs.at(step) == runs.at(step) == (first[0], 1)
    other = runs.at(decode([7, 8], [[1, 2], [3, 9]]))
    assert other is not None
    assert other == (first[0] + 1, 0)
    runs.forget([7])
    assert runs.at(decode([8, 9], [[1, 2], [3, 9]])) == (other[0], 1)
    runs.forget([9])
    assert runs.at(decode([9, 10], [[1, 2], [3, 9]])) == (other[0] + 1, 0)


def test_steps_that_are_not_worth_it_or_too_large_are_in_no_run() -> None:
    runs = DecodeRuns(row_bytes=1 << 20, pool_bytes=1 << 30)  # 64 rows
    assert runs.at(decode([1], [[1]])) is None
    small = DecodeRuns(row_bytes=1, pool_bytes=0)
    assert small.at(decode([500, 3, 2], [[1], [2], [3]])) is None
    prompt = RaggedBatch(np.array([0, 2], np.int32), np.array([2], np.int32), np.array([[1]], np.int32))
    assert small.at(prompt) is None
