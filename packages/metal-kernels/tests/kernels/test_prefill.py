"""Attention of requests with several rows, tiled and gathered, against the twin."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch, kernels, reference
from metal_kernels.kernels.dispatch import HEAD_SIZES

TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def batch_of(rng, query_lens, seq_lens, block_size):
    seq_lens = np.array(seq_lens, np.int32)
    needed = -(-seq_lens // block_size)
    ids = rng.permutation(needed.sum()).astype(np.int32) + 1
    table = np.zeros((len(seq_lens), needed.max(initial=0) + 1), np.int32)
    for request, count in enumerate(needed):
        table[request, :count], ids = ids[:count], ids[count:]
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return RaggedBatch(starts, seq_lens, table), int(needed.sum()) + 1


def check(
    query_lens,
    seq_lens,
    group=2,
    head_size=64,
    dtype=mx.bfloat16,
    *,
    route="tiled",
    sinks=False,
    block_size=16,
    **options,
):
    rng = np.random.default_rng(0)
    batch, blocks = batch_of(rng, query_lens, seq_lens, block_size)
    query = mx.array(rng.normal(size=(2 * group, batch.num_tokens, head_size)) * 2).astype(dtype).swapaxes(0, 1)
    cache = mx.array(rng.normal(size=(blocks, 2, block_size, 2, head_size))).astype(dtype)
    options |= {"scale": head_size**-0.5, "sinks": mx.array(rng.normal(size=2 * group)) if sinks else None}
    if route == "tiled":
        variant = kernels.prefill_kernel("metal", dtype, dtype, head_size).variant
        out = kernels.prefill_tiled(query, cache, batch, variant, order_token=mx.zeros(8), **options)
    else:
        out = kernels.prefill_gathered(query, cache, batch, order_token=mx.zeros(8), **options)
    want = reference.paged_attention(query, cache, batch, **options)
    assert out.dtype == dtype
    as_numpy = [np.array(a.astype(mx.float32)) for a in (out, want)]
    np.testing.assert_allclose(*as_numpy, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("route", ["tiled", "gathered"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_ragged_prompts(route, dtype):
    check([70, 1, 0, 16, 5], [70, 40, 3, 16, 90], dtype=dtype, route=route)


def test_rows_of_the_step_where_there_are_no_earlier_ones():
    rng = np.random.default_rng(0)
    batch, blocks = batch_of(rng, [20, 7, 9], [20, 30, 9], 8)
    query = mx.array(rng.normal(size=(batch.num_tokens, 4, 64))).astype(mx.float16)
    key, value = (mx.array(rng.normal(size=(batch.num_tokens, 2, 64))).astype(mx.float16) for _ in range(2))
    at = np.concatenate([np.arange(20), np.arange(23, 30), np.arange(9)])
    request = np.repeat(np.arange(3), [20, 7, 9])
    slots = mx.array((batch.block_table[request, at // 8] * 8 + at % 8).astype(np.int32))
    cache = mx.array(rng.normal(size=(blocks, 2, 8, 2, 64))).astype(mx.float16)
    written, _ = reference.reshape_and_cache(key, value, cache, slots)
    want = reference.paged_attention(query, written, batch, scale=0.125)
    mx.eval(written, want)
    # Nothing but the second request's pages is read.
    others = mx.array(batch.block_table[[0, 2]].ravel())
    written[others] = mx.array(float("nan"), mx.float16)
    got = kernels.prefill_gathered(query, written, batch, key=key, value=value, scale=0.125)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("window", [1, 20, 33])
def test_sliding_window(window):
    check([70, 9], [100, 90], sliding_window=window)


def test_soft_cap_and_sinks():
    check([20], [50], soft_cap=3.0, sinks=True, dtype=mx.float16)


def test_sinks_of_gathered_prompts():
    check([20], [50], sinks=True, dtype=mx.float16, route="gathered")


@pytest.mark.parametrize("head_size", [80, 256])
def test_head_sizes(head_size):
    check([19], [40], 1, head_size, mx.float16, block_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_everything_that_dispatch_accepts(head_size, dtype, group):
    check([19, 70], [400, 70], group, head_size, dtype, sinks=group == 3)


@pytest.mark.parametrize(
    ("change", "why"),
    [({"target": "cpu"}, "CPU"), ({"query_dtype": mx.float32}, "float32"), ({"head_size": 72}, "head size 72")],
)
def test_dispatch_says_why_not(change, why):
    call = {"target": "cuda", "query_dtype": mx.float16, "cache_dtype": mx.float16, "head_size": 64}
    assert isinstance(kernels.prefill_kernel(**call), kernels.Accepted)
    answer = kernels.prefill_kernel(**(call | change))
    assert isinstance(answer, kernels.Rejected)
    assert why in answer.why


def work_of(reqs, rows, keys):
    return kernels.PrefillWork(reqs, reqs * rows, reqs * keys, reqs * rows * keys, keys)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target": "cpu"}, "CPU"),
        ({"query_dtype": mx.float32}, "float32"),
        ({"heads": (16, 8, 256)}, "head size 256"),
        ({"masked": True}, "window"),
        ({"work": work_of(32, 64, 64)}, "tiled attention is estimated"),
    ],
)
def test_gathering_says_why_not(change, why):
    call = {
        "target": "cuda",
        "query_dtype": mx.float16,
        "cache_dtype": mx.float16,
        "heads": (16, 8, 128),
        "work": work_of(1, 8192, 8192),
        "masked": False,
    }
    assert isinstance(kernels.gathered_prefill(**call), kernels.Accepted)
    answer = kernels.gathered_prefill(**(call | change))
    assert isinstance(answer, kernels.Rejected)
    assert why in answer.why
