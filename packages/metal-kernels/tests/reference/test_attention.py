"""Paged attention against NumPy in float64, over random ragged batches and every option."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metal_kernels import MetalKernelsError, RaggedBatch, paged_attention, reference

TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def expected(query, kv_cache, batch, scale, window, soft_cap, sinks):
    """Return attention row by row, in float64."""
    q_heads, kv_heads, block_size = query.shape[1], kv_cache.shape[3], kv_cache.shape[2]
    out = np.zeros(query.shape)
    for request, seq_len in enumerate(batch.seq_lens):
        slots = [(batch.block_table[request, p // block_size], p % block_size) for p in range(seq_len)]
        if not slots:
            continue
        keys = np.array([kv_cache[b, 0, o] for b, o in slots])
        values = np.array([kv_cache[b, 1, o] for b, o in slots])
        for row in range(batch.query_start_loc[request], batch.query_start_loc[request + 1]):
            last = seq_len - batch.query_start_loc[request + 1] + row
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(q_heads):
                kv_head = head // (q_heads // kv_heads)
                scores = keys[first : last + 1, kv_head] @ query[row, head] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                logits = scores if sinks is None else np.append(scores, sinks[head])
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                out[row, head] = weights[: len(scores)] @ values[first : last + 1, kv_head]
    return out


def ragged_batch(rng, query_lens, contexts, block_size, extra_columns=0):
    """Return a batch over shuffled blocks, and the number of blocks its cache needs."""
    seq_lens = np.array(query_lens, np.int32) + np.array(contexts, np.int32)
    needed = -(-seq_lens // block_size)
    ids = rng.permutation(int(needed.sum())).astype(np.int32) + 1
    table = np.zeros((len(seq_lens), int(needed.max(initial=0)) + extra_columns), np.int32)
    for request, count in enumerate(needed):
        table[request, :count], ids = ids[:count], ids[count:]
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return RaggedBatch(starts, seq_lens, table), int(needed.sum()) + 1


def check(rng, batch, blocks, *, block_size, kv_heads, group, head_size, dtype, window, soft_cap, sinks):
    scale = head_size**-0.5
    query = mx.array(rng.normal(size=(batch.num_tokens, kv_heads * group, head_size)) * 2).astype(dtype)
    cache = mx.array(rng.normal(size=(blocks, 2, block_size, kv_heads, head_size))).astype(dtype)
    sink_logits = mx.array(rng.normal(size=kv_heads * group)).astype(dtype) if sinks else None
    out = paged_attention(
        query, cache, batch, scale=scale, sliding_window=window, soft_cap=soft_cap, sinks=sink_logits
    )
    as64 = [None if a is None else np.array(a.astype(mx.float32), np.float64) for a in (query, cache, sink_logits)]
    want = expected(as64[0], as64[1], batch, scale, window, soft_cap, as64[2])
    assert out.dtype == dtype
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


requests = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=6)


@settings(max_examples=120, deadline=None)
@given(
    requests=requests,
    block_size=st.sampled_from([1, 8, 16]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from(list(TOLERANCE)),
    window=st.none() | st.integers(1, 20),
    soft_cap=st.none() | st.sampled_from([2.0, 30.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_ragged_batches(requests, block_size, kv_heads, group, dtype, window, soft_cap, sinks, seed):
    rng = np.random.default_rng(seed)
    batch, blocks = ragged_batch(rng, *zip(*requests, strict=True), block_size, extra_columns=2)
    check(
        rng,
        batch,
        blocks,
        block_size=block_size,
        kv_heads=kv_heads,
        group=group,
        head_size=8,
        dtype=dtype,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
    )


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_head_sizes(head_size, dtype):
    rng = np.random.default_rng(head_size)
    batch, blocks = ragged_batch(rng, [1, 1, 5], [30, 7, 3], 16)
    options = dict(window=None, soft_cap=None, sinks=False)
    check(rng, batch, blocks, block_size=16, kv_heads=2, group=2, head_size=head_size, dtype=dtype, **options)


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_prompt_of_several_tiles(window, soft_cap):
    rng = np.random.default_rng(1)
    batch, blocks = ragged_batch(rng, [1, 530, 1], [9, 20, 600], 16)
    check(
        rng,
        batch,
        blocks,
        block_size=16,
        kv_heads=1,
        group=2,
        head_size=8,
        dtype=mx.float32,
        window=window,
        soft_cap=soft_cap,
        sinks=window is None,
    )


@pytest.mark.parametrize("window", [None, 33])
def test_decodes_of_very_different_lengths_anywhere_in_the_batch(window):
    rng = np.random.default_rng(2)
    batch, blocks = ragged_batch(rng, [1, 3, 1, 0, 1, 1, 1], [900, 4, 0, 5, 400, 880, 410], 16)
    check(
        rng,
        batch,
        blocks,
        block_size=16,
        kv_heads=2,
        group=1,
        head_size=8,
        dtype=mx.float32,
        window=window,
        soft_cap=None,
        sinks=True,
    )


def test_unused_blocks_are_never_seen():
    rng = np.random.default_rng(3)
    batch, blocks = ragged_batch(rng, [1, 1, 4], [20, 3, 2], 8, extra_columns=3)
    query = mx.array(rng.normal(size=(6, 2, 8)).astype(np.float32))
    pages = rng.normal(size=(blocks + 2, 2, 8, 2, 8)).astype(np.float32)
    clean = reference.paged_attention(query, mx.array(pages), batch, scale=0.3)
    pages[0] = pages[-2:] = np.nan
    table = batch.block_table
    for request, seq_len in enumerate(batch.seq_lens):
        if seq_len % 8:
            pages[table[request, seq_len // 8], :, seq_len % 8 :] = np.nan
    assert mx.array_equal(clean, reference.paged_attention(query, mx.array(pages), batch, scale=0.3))


def test_no_rows():
    none = np.zeros(0, np.int32)
    batch = RaggedBatch(np.zeros(1, np.int32), none, np.zeros((0, 0), np.int32))
    cache = mx.zeros((2, 2, 8, 1, 8))
    assert paged_attention(mx.zeros((0, 2, 8)), cache, batch, scale=1.0).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": mx.zeros((2, 2, 8))}, "expected query of shape"),
        ({"query": mx.zeros((1, 3, 8))}, "multiple of 2 query heads"),
        ({"kv_cache": mx.zeros((3, 2, 4, 2, 8))}, "expected blocks for 5 tokens"),
        ({"sliding_window": 0}, "sliding window of at least 1"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    batch = RaggedBatch(np.array([0, 1], np.int32), np.array([5], np.int32), np.array([[1]], np.int32))
    arguments = {"query": mx.zeros((1, 2, 8)), "kv_cache": mx.zeros((3, 2, 8, 2, 8)), "scale": 1.0}
    with pytest.raises(MetalKernelsError, match=message):
        paged_attention(batch=batch, **{**arguments, **change})
