"""Latent attention and its cache writes, against NumPy in float64 over random ragged batches."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metal_kernels import MetalKernelsError, RaggedBatch, concat_and_cache_mla, mla_attention, read_pages, reference

TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def expected(query, rows, batch, scale, latent_size):
    """Return attention row by row, in float64; ``query`` is latent and rotary part together."""
    block_size = rows.shape[1]
    out = np.zeros((*query.shape[:2], latent_size))
    for request, seq_len in enumerate(batch.seq_lens):
        positions = np.arange(seq_len)
        cached = rows[batch.block_table[request, positions // block_size], positions % block_size]
        for row in range(batch.query_start_loc[request], batch.query_start_loc[request + 1]):
            seen = cached[: seq_len - batch.query_start_loc[request + 1] + row + 1]
            scores = query[row] @ seen.T * scale
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[row] = weights / weights.sum(axis=-1, keepdims=True) @ seen[:, :latent_size]
    return out


def ragged_batch(rng, query_lens, contexts, block_size):
    """Return a batch over shuffled blocks, and the number of blocks its cache needs."""
    seq_lens = np.array(query_lens, np.int32) + np.array(contexts, np.int32)
    needed = -(-seq_lens // block_size)
    ids = rng.permutation(int(needed.sum())).astype(np.int32) + 1
    table = np.zeros((len(seq_lens), int(needed.max(initial=0)) + 1), np.int32)
    for request, count in enumerate(needed):
        table[request, :count], ids = ids[:count], ids[count:]
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return RaggedBatch(starts, seq_lens, table), int(needed.sum()) + 1


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 4, 16]),
    q_heads=st.integers(1, 6),
    sizes=st.sampled_from([(16, 8), (32, 0), (6, 4)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_attention_over_ragged_batches(requests, block_size, q_heads, sizes, dtype, seed):
    rng = np.random.default_rng(seed)
    latent_size, rope_size = sizes
    batch, blocks = ragged_batch(rng, *zip(*requests, strict=True), block_size)
    latent, rope = (mx.array(rng.normal(size=(batch.num_tokens, q_heads, size)) * 2).astype(dtype) for size in sizes)
    cache = mx.array(rng.normal(size=(blocks, block_size, latent_size + rope_size))).astype(dtype)
    scale = (latent_size + rope_size) ** -0.5
    out = mla_attention(latent, rope, cache, batch, scale=scale)
    as64 = [np.array(a.astype(mx.float32), np.float64) for a in (mx.concatenate([latent, rope], axis=-1), cache)]
    want = expected(*as64, batch, scale, latent_size)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_attention_over_a_prompt_longer_than_a_tile():
    rng = np.random.default_rng(0)
    batch, blocks = ragged_batch(rng, [1, 300], [5, 40], 16)
    latent, rope = (mx.array(rng.normal(size=(301, 2, size)), mx.float32) for size in (8, 4))
    cache = mx.array(rng.normal(size=(blocks, 16, 12)), mx.float32)
    out = mla_attention(latent, rope, cache, batch, scale=0.3)
    query = np.array(mx.concatenate([latent, rope], axis=-1), np.float64)
    np.testing.assert_allclose(np.array(out), expected(query, np.array(cache), batch, 0.3, 8), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("write", [concat_and_cache_mla, reference.concat_and_cache_mla])
def test_rows_go_to_their_slots(write):
    rng = np.random.default_rng(1)
    cache = np.zeros((5, 4, 12), np.float32)
    latent, rope = (rng.normal(size=(4, size)).astype(np.float32) for size in (8, 4))
    slots = np.array([7, -1, 16, 4], np.int32)
    written, _ = write(mx.array(latent), mx.array(rope), mx.array(cache), mx.array(slots))
    for row, slot in enumerate(slots):
        if slot >= 0:
            cache[slot // 4, slot % 4] = np.concatenate([latent[row], rope[row]])
    assert np.array_equal(np.array(written), cache)


@pytest.mark.parametrize("slots", [[], [-1, -1]])
def test_a_write_of_nothing(slots):
    cache = mx.ones((2, 4, 6))
    rows = mx.zeros((len(slots), 4))
    written, _ = concat_and_cache_mla(rows, rows[:, :2], cache, mx.array(slots, mx.int32))
    assert mx.array_equal(written, cache)


def test_pages_hold_what_the_batch_reads():
    rng = np.random.default_rng(2)
    batch, blocks = ragged_batch(rng, [1, 3], [9, 4], 4)
    cache = mx.array(rng.normal(size=(blocks + 7, 4, 6)), mx.float32)
    pages, own = read_pages(cache, batch)
    for mine, original in zip(own.block_table, batch.block_table, strict=True):
        assert mx.array_equal(pages[mx.array(mine)], cache[mx.array(original)])
    assert np.array_equal(own.seq_lens, batch.seq_lens)


def test_refusals():
    batch, blocks = ragged_batch(np.random.default_rng(0), [1, 3], [9, 4], 4)
    cache = mx.zeros((blocks, 4, 12))
    with pytest.raises(MetalKernelsError, match="even row_size"):
        mla_attention(mx.zeros((4, 2, 8)), mx.zeros((4, 2, 3)), mx.zeros((blocks, 4, 11)), batch, scale=1.0)
    with pytest.raises(MetalKernelsError, match="query_rope"):
        mla_attention(mx.zeros((4, 2, 8)), mx.zeros((4, 2, 3)), cache, batch, scale=1.0)
    with pytest.raises(MetalKernelsError, match="expected query of shape"):
        mla_attention(mx.zeros((5, 2, 8)), mx.zeros((5, 2, 4)), cache, batch, scale=1.0)
    with pytest.raises(MetalKernelsError, match="blocks for 10 tokens"):
        mla_attention(mx.zeros((4, 2, 8)), mx.zeros((4, 2, 4)), mx.zeros((blocks, 1, 12)), batch, scale=1.0)
    with pytest.raises(MetalKernelsError, match="rope"):
        concat_and_cache_mla(mx.zeros((2, 8)), mx.zeros((2, 6)), cache, mx.array([1, 2], mx.int32))
