"""Quantised rows, written and read by kernels, against their twins."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import RaggedBatch, RowFormat, kernels, reference
from metal_kernels.kernels.dispatch import FLOAT_DTYPES, HEAD_SIZES
from metal_kernels.kernels.quantized_cache_write import FORMATS

TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
BLOCK = 4


def batch_of(rng, query_lens, seq_lens, block_size):
    seq_lens = np.array(seq_lens, np.int32)
    needed = -(-seq_lens // block_size)
    ids = rng.permutation(needed.sum()).astype(np.int32) + 1
    table = np.zeros((len(seq_lens), needed.max(initial=0) + 1), np.int32)
    for request, count in enumerate(needed):
        table[request, :count], ids = ids[:count], ids[count:]
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return RaggedBatch(starts, seq_lens, table), int(needed.sum()) + 1


def check_write(row_format, dtype=mx.float32, tokens=5, size=1.0):
    rng = np.random.default_rng(0)
    heads, head_size = row_format.num_kv_heads, row_format.head_size
    rows = (rng.normal(size=(tokens, 2 * heads, head_size)) * size).astype(np.float32)
    rows[:, :, 3] *= 30
    if tokens > 2:
        rows[2, 0] = 0
    rows = mx.array(rows).astype(dtype)
    key, value = rows[:, :heads], rows[:, heads:]
    slots = rng.permutation(5 * BLOCK)[:tokens].astype(np.int32)
    slots[1::3] = -1
    pages = mx.zeros((5, BLOCK, row_format.row_words), mx.uint32)
    want, _ = reference.quantized_reshape_and_cache(key, value, pages + 0, mx.array(slots), row_format)
    written, _ = kernels.quantized_reshape_and_cache(key, value, pages, mx.array(slots), row_format)
    assert np.array_equal(np.array(written), np.array(want))


def check_attention(
    row_format, seq_lens, group, dtype=mx.float32, *, query_lens=None, sinks=False, block_size=BLOCK, **options
):
    rng = np.random.default_rng(0)
    heads, head_size = row_format.num_kv_heads, row_format.head_size
    batch, blocks = batch_of(rng, query_lens or [1] * len(seq_lens), seq_lens, block_size)
    query = mx.array(rng.normal(size=(batch.num_tokens, heads * group, head_size)) * 2).astype(dtype)
    rows = (mx.array(rng.normal(size=(blocks * block_size, heads, head_size)), mx.float32) for _ in range(2))
    pages = mx.zeros((blocks, block_size, row_format.row_words), mx.uint32)
    slots = mx.arange(blocks * block_size, dtype=mx.int32)
    pages, _ = reference.quantized_reshape_and_cache(*rows, pages, slots, row_format)
    options |= {"scale": head_size**-0.5, "sinks": mx.array(rng.normal(size=heads * group)) if sinks else None}
    decode = kernels.quantized_decode_kernel("metal", dtype, row_format, group)
    out = kernels.quantized_paged_attention(
        query, pages, batch, row_format, decode, order_token=mx.zeros(8, mx.int32), **options
    )
    want = reference.quantized_paged_attention(query, pages, batch, row_format, **options)
    assert out.dtype == dtype
    as_numpy = [np.array(a.astype(mx.float32)) for a in (out, want)]
    np.testing.assert_allclose(*as_numpy, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("key", "value"),
    [("int8", "int8"), ("fp8_e4m3", "int4"), ("int4", "fp8_e4m3"), ("float16", "bfloat16"), ("float32", "int8")],
)
def test_rows_are_those_of_the_twin(key, value):
    check_write(RowFormat(3, 64, key, value, padded_bytes=2048), mx.bfloat16)


@pytest.mark.parametrize("size", [1e-6, 1e3])
@pytest.mark.parametrize("element", ["int8", "fp8_e4m3", "int4"])
def test_rows_of_any_size(element, size):
    check_write(RowFormat(1, 128, element, element), size=size)


@pytest.mark.parametrize("head_size", [72, 80, 256])
def test_head_sizes_are_written(head_size):
    check_write(RowFormat(1, head_size, "int4", "fp8_e4m3"), mx.float16, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3", "int4"), ("int4", "bfloat16"), ("float16", "float32")],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_formats(key, value, dtype):
    check_attention(RowFormat(2, 64, key, value), [70, 1, 9], 2, dtype)


@pytest.mark.parametrize("window", [1, 33])
def test_sliding_window_over_ranges(window):
    check_attention(RowFormat(1, 64, "int8", "fp8_e4m3"), [600, 5], 1, mx.bfloat16, sliding_window=window)


@pytest.mark.parametrize("seq_lens", [[5, 9], [700]], ids=["direct", "split"])
def test_soft_cap_and_sinks(seq_lens):
    check_attention(RowFormat(1, 64, "fp8_e4m3", "int8"), seq_lens, 2, mx.float16, soft_cap=3.0, sinks=True)


def test_query_heads_in_several_threadgroups():
    check_attention(RowFormat(2, 128, "int8", "int8"), [40], 7, mx.bfloat16, block_size=16)


@pytest.mark.parametrize("query_lens", [[1, 0, 4, 1], [3, 1, 5, 9]], ids=["mixed", "prompts"])
def test_requests_with_several_rows(query_lens):
    check_attention(RowFormat(1, 64, "int8", "int8"), [70, 1, 40, 9], 2, query_lens=query_lens, sliding_window=50)


def test_head_sizes_that_leave_lanes_idle():
    check_attention(RowFormat(1, 80, "int4", "int8"), [40], 2, mx.float16)


def test_rows_aligned_to_words_only():
    check_attention(RowFormat(1, 96, "int8", "int4", padded_bytes=204), [40], 2)


@pytest.mark.parametrize(
    ("change", "why"), [({"target": "cpu"}, "CPU"), ({"query_dtype": mx.int32}, "float16"), ({"size": 72}, "72")]
)
def test_dispatch_says_why_not(change, why):
    call = {"target": "cuda", "query_dtype": mx.float16, "size": 64} | change
    row_format = RowFormat(2, call["size"], "int8", "int8")
    answer = kernels.quantized_decode_kernel(call["target"], call["query_dtype"], row_format, 2)
    assert isinstance(answer, kernels.Rejected)
    assert why in answer.why


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 64])
def test_every_head_has_its_place(head_size, group):
    variant = kernels.quantized_decode_kernel("metal", mx.float16, RowFormat(1, head_size, "int8", "int4"), group)
    variant = variant.variant
    assert variant.lanes * variant.width >= head_size
    assert (variant.parts - 1) * variant.heads < group <= variant.parts * variant.heads
    assert variant.simdgroups * variant.heads * (head_size + 2) * 4 <= 32 * 1024


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 64])
def test_every_head_has_its_place_in_matrices(head_size, group):
    variant = kernels.quantized_decode_kernel(
        "metal", mx.float16, RowFormat(2, head_size, "int8", "fp8_e4m3"), group
    ).variant
    assert variant.heads <= 8
    assert (variant.parts - 1) * variant.heads < group <= variant.parts * variant.heads
    assert variant.simdgroups * (variant.heads * (head_size + 3) + 8) * 4 <= 32 * 1024


@pytest.mark.parametrize(("head_size", "group"), [(80, 3), (256, 3), (256, 8)])
def test_head_sizes_in_matrices(head_size, group):
    check_attention(RowFormat(2, head_size, "fp8_e4m3", "int8"), [40, 3], group, mx.float16)


def test_values_of_very_different_size():
    """Weights are relative to the largest scale so far, which grows from key to key."""
    row_format = RowFormat(1, 64, "int8", "int8")
    rng = np.random.default_rng(1)
    batch, blocks = batch_of(rng, [1], [100], BLOCK)
    pages = mx.zeros((blocks, BLOCK, row_format.row_words), mx.uint32)
    slots = (batch.block_table[0, :25, None] * BLOCK + np.arange(BLOCK)).ravel().astype(np.int32)
    value = rng.normal(size=(100, 1, 64)) * 10.0 ** np.linspace(-6, 4, 100)[:, None, None]
    value[:3] = 0
    key = mx.array(rng.normal(size=(100, 1, 64)), mx.float32)
    pages, _ = reference.quantized_reshape_and_cache(
        key, mx.array(value, mx.float32), pages, mx.array(slots), row_format
    )
    query = mx.array(rng.normal(size=(1, 2, 64)) * 1e-3).astype(mx.float16)
    decode = kernels.quantized_decode_kernel("metal", mx.float16, row_format, 2)
    out = kernels.quantized_paged_attention(query, pages, batch, row_format, decode, scale=1.0)
    want = np.array(reference.quantized_paged_attention(query, pages, batch, row_format, scale=1.0), np.float64)
    np.testing.assert_allclose(np.array(out, np.float64), want, rtol=0, atol=2e-3 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("key", FORMATS)
@pytest.mark.parametrize("value", FORMATS)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_everything_that_dispatch_accepts(head_size, key, value, group, dtype):
    row_format = RowFormat(2, head_size, key, value)
    check_write(row_format, dtype)
    check_attention(row_format, [70, 3, 600], group, dtype, sinks=group == 3, block_size=16)
