"""Paged decode against its twin: every option, head sizes, ranges cut from long contexts."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch, kernels, reference
from metal_kernels.kernels.dispatch import BLOCK_SIZES, FLOAT_DTYPES, HEAD_SIZES

TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
ONE = {"seq_lens": [1], "kv_heads": 1, "group": 1}
RAGGED = {"seq_lens": [70, 1, 600, 9], "kv_heads": 1, "group": 2}


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
    seq_lens,
    kv_heads,
    group,
    head_size=64,
    block_size=16,
    dtype=mx.float32,
    *,
    query_lens=None,
    sinks=False,
    decode=None,
    **options,
):
    rng = np.random.default_rng(0)
    batch, blocks = batch_of(rng, query_lens or [1] * len(seq_lens), seq_lens, block_size)
    query = mx.array(rng.normal(size=(batch.num_tokens, kv_heads * group, head_size)) * 2).astype(dtype)
    cache = mx.array(rng.normal(size=(blocks, 2, block_size, kv_heads, head_size))).astype(dtype)
    options |= {"scale": head_size**-0.5, "sinks": mx.array(rng.normal(size=kv_heads * group)) if sinks else None}
    decode = decode or kernels.decode_kernel("metal", dtype, dtype, head_size, block_size, group)
    out = kernels.paged_attention(query, cache, batch, decode, order_token=mx.zeros(8), **options)
    want = reference.paged_attention(query, cache, batch, **options)
    assert out.dtype == dtype
    as_numpy = [np.array(a.astype(mx.float32)) for a in (out, want)]
    np.testing.assert_allclose(*as_numpy, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dtypes(case, dtype):
    check(**case, dtype=dtype)


@pytest.mark.parametrize("window", [1, 33, 400])
def test_sliding_window(window):
    check(**RAGGED, sliding_window=window)


@pytest.mark.parametrize("seq_lens", [[5, 9], [700]], ids=["direct", "split"])
def test_soft_cap_and_sinks(seq_lens):
    check(seq_lens, 1, 2, soft_cap=3.0, sinks=True)


def test_query_heads_in_several_threadgroups():
    check([40], 2, 7, head_size=128, dtype=mx.bfloat16)


@pytest.mark.parametrize("query_lens", [[1, 0, 4, 1], [3, 1, 5, 9]], ids=["mixed", "prompts"])
def test_requests_with_several_rows(query_lens):
    check(**RAGGED, query_lens=query_lens, sliding_window=50)


def test_without_a_decode_kernel():
    check([30, 3], 1, 2, head_size=24, query_lens=[1, 2], decode=kernels.Rejected("head size"))


def test_no_rows():
    none = np.zeros(0, np.int32)
    batch = RaggedBatch(np.zeros(1, np.int32), none, np.zeros((0, 0), np.int32))
    cache, query = mx.zeros((2, 2, 8, 1, 64)), mx.zeros((0, 2, 64))
    decode = kernels.decode_kernel("metal", mx.float32, mx.float32, 64, 8, 2)
    assert kernels.paged_attention(query, cache, batch, decode, scale=1.0).shape == (0, 2, 64)


@pytest.mark.parametrize("head_size", [80, 256])
def test_head_sizes(head_size):
    check([40], 1, 2, head_size, 8, mx.float16)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["metal", "cuda"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_everything_that_dispatch_accepts(target, head_size, block_size, dtype, group):
    decode = kernels.decode_kernel(target, dtype, dtype, head_size, block_size, group)
    check([70, 3, 600], 2, group, head_size, block_size, dtype, sinks=group == 3, decode=decode)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "group"), [(128, 2), (128, 8), (80, 1), (256, 4)])
def test_layouts_of_cuda(head_size, group, dtype):
    decode = kernels.decode_kernel("cuda", dtype, dtype, head_size, 16, group)
    check([70, 3], 1, group, head_size, dtype=dtype, decode=decode)


@pytest.mark.parametrize(
    ("head_size", "block_size", "group", "options"),
    [
        (64, 8, 3, {"sliding_window": 33}),
        (128, 16, 8, {"soft_cap": 3.0, "sinks": True}),
        (64, 32, 9, {"query_lens": [1, 4, 1]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tiles", [1, 2])
def test_matrices(head_size, block_size, group, options, tiles):
    decode = kernels.decode_kernel("cuda", mx.float16, mx.float16, head_size, block_size, group)
    decode = kernels.Accepted(replace(decode.variant, tiles=tiles))
    check([70, 40, 600], 2, group, head_size, block_size, mx.float16, decode=decode, **options)
