"""Latent decode against its twin."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch, kernels, reference
from metal_kernels.kernels import ExpandedPrefill, LatentPrompts, PrefillVariant

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


class Projections:
    """Of two heads, as a layer would have them."""

    def __init__(self, rng, latent_size, nope_size, value_size, dtype):
        def normal(*shape):
            return mx.array(rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5).astype(dtype)

        self.key, self.value = normal(2, latent_size, nope_size), normal(2, value_size, latent_size)
        self.value_size = value_size

    def absorb(self, query):
        return (query.swapaxes(0, 1) @ self.key.swapaxes(1, 2)).swapaxes(0, 1)

    def unabsorb(self, weighted):
        return (weighted.swapaxes(0, 1) @ self.value.swapaxes(1, 2)).swapaxes(0, 1)

    def expand(self, latent):
        return latent @ self.key, latent @ self.value.swapaxes(1, 2)


def prompts(rng, dtype, lens=((20, 20), (3, 35))):
    """Requests of (rows, keys), latents of 64, keys of 48 and 16, values of 40."""
    counts = np.array(lens).T
    blocks = 1 + rng.permutation(8)[: 2 * 3].reshape(2, 3)
    starts = np.append(0, np.cumsum(counts[0])).astype(np.int32)
    batch = RaggedBatch(starts, counts[1].astype(np.int32), blocks.astype(np.int32))
    rows = [mx.array(rng.normal(size=(starts[-1], 2, size)).astype(np.float32)).astype(dtype) for size in (48, 16)]
    cache = mx.array(rng.normal(size=(9, 16, 80)).astype(np.float32)).astype(dtype)
    mx.eval(rows, cache)
    return rows, cache, batch


@pytest.mark.parametrize(
    "route", [ExpandedPrefill(None, 8), ExpandedPrefill(None, 64), ExpandedPrefill(PrefillVariant(4), 0)]
)
def test_expanded_prompts(route):
    rng = np.random.default_rng(0)
    rows, cache, batch = prompts(rng, mx.float16)
    projections = Projections(rng, 64, 48, 40, mx.float16)
    out = kernels.mla_prefill(*rows, cache, batch, projections, route, scale=0.125, order_token=mx.zeros(8))
    exact = [array.astype(mx.float32) for array in (*rows, cache)]
    projections.key, projections.value = projections.key.astype(mx.float32), projections.value.astype(mx.float32)
    want = reference.mla_attention(*exact, batch, scale=0.125, projections=projections)
    assert out.dtype == mx.float16
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), np.array(want), atol=8e-3, rtol=8e-3)


def test_prompts_beside_decodes():
    rng = np.random.default_rng(0)
    rows, cache, batch = prompts(rng, mx.float16, ((1, 9), (25, 40)))
    projections = Projections(rng, 64, 48, 40, mx.float16)
    decode = kernels.mla_decode_kernel("cuda", mx.float16, mx.float16, 64, 16)
    options = {"scale": 0.125, "order_token": mx.zeros(8), "projections": projections}
    out = kernels.mla_attention(*rows, cache, batch, decode, **options)
    want = reference.mla_attention(*rows, cache, batch, **options)
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), np.array(want.astype(mx.float32)), atol=2e-2)


PROMPT = LatentPrompts(reqs=1, rows=2048, keys=2048, pairs=2048 * 1024, longest=2048, block_size=16)


@pytest.mark.parametrize(
    ("change", "prompts", "why"),
    [
        ({"target": "cpu"}, {}, "CPU"),
        ({"cache_dtype": mx.float32}, {}, "cache"),
        ({"q_heads": 2048}, {}, "are made at once"),
        ({}, {"rows": 8, "pairs": 8 * 2048}, "fewer"),
    ],
    ids=str,
)
def test_says_why_keys_are_not_expanded(change, prompts, why):
    given = {
        "target": "cuda",
        "query_dtype": mx.bfloat16,
        "cache_dtype": mx.bfloat16,
        "q_heads": 16,
        "sizes": (512, 128, 64, 128),
    }
    assert kernels.expanded_prefill(**given, prompts=PROMPT).variant == ExpandedPrefill(None, 2048)
    assert why in kernels.expanded_prefill(**given | change, prompts=replace(PROMPT, **prompts)).why


def test_short_prompts_share_a_launch():
    many = replace(PROMPT, reqs=8, longest=256, pairs=8 * 256 * 128)
    wide = (64, 32, 32, 32)
    assert kernels.expanded_prefill("cuda", mx.float16, mx.float16, 16, wide, many).variant.tiled == PrefillVariant(4)
    other = replace(many, block_size=13)
    assert kernels.expanded_prefill("cuda", mx.float16, mx.float16, 16, wide, other).variant.tiled is None
