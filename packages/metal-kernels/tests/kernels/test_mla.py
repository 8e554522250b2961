"""Latent decode against its twin."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch, kernels, reference

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


def check(seq_lens, q_heads, sizes=(64, 16), dtype=mx.bfloat16, *, query_lens=None, block_size=16):
    rng = np.random.default_rng(0)
    latent_size = sizes[0]
    batch, blocks = batch_of(rng, query_lens or [1] * len(seq_lens), seq_lens, block_size)
    # Parts of one array, as a model makes them: strided.
    query = mx.array(rng.normal(size=(batch.num_tokens, q_heads, sum(sizes))) * 2).astype(dtype)
    latent, rope = query[..., :latent_size], query[..., latent_size:]
    cache = mx.array(rng.normal(size=(blocks, block_size, sum(sizes)))).astype(dtype)
    decode = kernels.mla_decode_kernel("metal", dtype, dtype, *sizes)
    out = kernels.mla_attention(latent, rope, cache, batch, decode, scale=sum(sizes) ** -0.5, order_token=mx.zeros(8))
    want = reference.mla_attention(latent, rope, cache, batch, scale=sum(sizes) ** -0.5)
    assert out.dtype == dtype
    as_numpy = [np.array(a.astype(mx.float32)) for a in (out, want)]
    np.testing.assert_allclose(*as_numpy, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("seq_lens", [[1], [70, 1, 300, 9]], ids=["one", "ragged"])
def test_dtypes(seq_lens, dtype):
    check(seq_lens, 16, dtype=dtype)


@pytest.mark.parametrize("q_heads", [1, 20])
def test_heads_that_do_not_fill_a_matrix(q_heads):
    check([40], q_heads, dtype=mx.float16)


@pytest.mark.parametrize("sizes", [(512, 64), (256, 32), (64, 0)], ids=str)
def test_sizes(sizes):
    check([37], 16, sizes)


@pytest.mark.parametrize("query_lens", [[1, 0, 4, 1], [3, 1, 5, 9]], ids=["mixed", "prompts"])
def test_requests_with_several_rows(query_lens):
    check([70, 1, 40, 9], 4, query_lens=query_lens, block_size=8)


def test_without_a_kernel():
    check([30, 3], 2, (24, 8), mx.float32, query_lens=[1, 2])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target": "cpu"}, "CPU"),
        ({"query_dtype": mx.float32}, "float32"),
        ({"latent_size": 72}, "latent size 72"),
        ({"latent_size": 1024}, "1088 elements"),
    ],
)
def test_dispatch_says_why_not(change, why):
    call = {
        "target": "cuda",
        "query_dtype": mx.float16,
        "cache_dtype": mx.float16,
        "latent_size": 512,
        "rope_size": 64,
    }
    assert isinstance(kernels.mla_decode_kernel(**call), kernels.Accepted)
    answer = kernels.mla_decode_kernel(**(call | change))
    assert isinstance(answer, kernels.Rejected)
    assert why in answer.why
