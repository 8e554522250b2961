import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import (
    MetalKernelsError,
    RaggedBatch,
    RowFormat,
    paged_attention,
    quantized_gather_kv_cache,
    quantized_paged_attention,
    quantized_reshape_and_cache,
    reshape_and_cache,
)

HEADS, SIZE, BLOCK = 2, 64, 4
FORMATS = ["fp8_e4m3", "int8", "int4", "float16", "bfloat16", "float32"]


def rows(tokens, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return tuple((scale * rng.standard_normal((tokens, HEADS, SIZE))).astype(np.float32) for _ in "kv")


def tolerance(x, element):
    """The largest error that the format allows each element of ``x``, float32's own rounding included."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    match element:
        case "fp8_e4m3":  # half a unit of 3 mantissa bits, or of the smallest number
            bound = np.maximum(np.abs(x) * 2.0**-4, largest / 448 * 2.0**-10)
        case "int8":
            bound = np.broadcast_to(largest / 127 / 2, x.shape)
        case "int4":  # half a step; step and bias are float16, so the highest and lowest are off by their rounding
            groups = x.reshape(*x.shape[:-1], -1, 32)
            low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
            bound = (high - low) / 15 / 2 * (1 + 2.0**-10) + (np.abs(low) + np.abs(high - low)) * 2.0**-10
            bound = np.broadcast_to(bound, groups.shape).reshape(x.shape)
        case "float16":
            bound = np.abs(x) * 2.0**-11 + 2.0**-25
        case "bfloat16":
            bound = np.abs(x) * 2.0**-8
        case _:
            bound = np.zeros_like(x)
    return bound * (1 + 1e-5) + 1e-7 * np.abs(x)


def written(key, value, row_format, slots=None, blocks=8):
    slots = np.arange(BLOCK, BLOCK + len(key), dtype=np.int32) if slots is None else slots
    cache = mx.zeros((blocks, BLOCK, row_format.row_words), mx.uint32)
    return quantized_reshape_and_cache(mx.array(key), mx.array(value), cache, mx.array(slots), row_format)


@pytest.mark.parametrize("value_format", FORMATS)
@pytest.mark.parametrize("key_format", FORMATS)
def test_rows_come_back_within_the_formats_own_error(key_format, value_format):
    row_format = RowFormat(HEADS, SIZE, key_format, value_format)
    key, value = rows(11)
    key[:, :, 3] *= 30  # an outlier channel, as keys have
    value[2] = 0
    table = np.array([5, 1, 7], np.int32)
    slots = (table[:, None] * BLOCK + np.arange(BLOCK)).ravel()[:11].astype(np.int32)
    cache, _ = written(key, value, row_format, slots)
    keys, values = quantized_gather_kv_cache(cache, mx.array(table), 11, row_format)
    assert (np.abs(np.array(keys) - key) <= tolerance(key, key_format)).all()
    assert (np.abs(np.array(values) - value) <= tolerance(value, value_format)).all()
    untouched = sorted(set(range(8 * BLOCK)) - set(slots.tolist()))
    assert not np.array(cache).reshape(8 * BLOCK, -1)[untouched].any()


@pytest.mark.parametrize("element", FORMATS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_rows_of_any_size_are_scaled(element, scale):
    row_format = RowFormat(HEADS, SIZE, element, element)
    key, value = rows(5, 1, scale)
    keys, _ = quantized_gather_kv_cache(written(key, value, row_format)[0], mx.array([1, 2], mx.int32), 5, row_format)
    # float16 has no more than 2**-24 to tell apart: where a step or bias of int4 is that small
    assert (np.abs(np.array(keys) - key) <= tolerance(key, element) + 16 * 2.0**-24 * (element == "int4")).all()


def test_negative_slots_are_skipped():
    row_format = RowFormat(HEADS, SIZE, "int8", "int8")
    key, value = rows(3)
    cache, _ = written(key, value, row_format, np.array([-1, 6, -1], np.int32))
    assert np.flatnonzero(np.array(cache).reshape(8 * BLOCK, -1).any(axis=1)).tolist() == [6]
    same, _ = written(key, value, row_format, np.array([-1, -1, -1], np.int32))
    assert not np.array(same).any()


@pytest.mark.parametrize(("key_format", "value_format"), [("int8", "int8"), ("fp8_e4m3", "int4"), ("int4", "float16")])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"soft_cap": 5.0}, {"sinks": mx.array([0.5] * 4)}])
def test_attention_is_that_over_the_dequantised_rows(key_format, value_format, options):
    """Padded rows, decodes and a prompt: the same as a float32 cache that holds what the quantised one holds."""
    row_format = RowFormat(HEADS, SIZE, key_format, value_format, padded_bytes=1024)
    key, value = rows(5 + 9)
    table = np.array([[6, 2, 0], [3, 7, 5]], np.int32)
    slots = np.concatenate(
        [(row[:, None] * BLOCK + np.arange(BLOCK)).ravel()[:length] for row, length in zip(table, (5, 9), strict=True)]
    ).astype(np.int32)
    cache, token = written(key, value, row_format, slots)
    plain = mx.zeros((8, 2, BLOCK, HEADS, SIZE))
    for row, begin, length in ((table[0], 0, 5), (table[1], 5, 9)):
        pair = quantized_gather_kv_cache(cache, mx.array(row), length, row_format)
        plain, _ = reshape_and_cache(*pair, plain, mx.array(slots[begin : begin + length]))
        mx.eval(plain)
    batch = RaggedBatch(np.array([0, 1, 5], np.int32), np.array([5, 9], np.int32), table)
    query = mx.array(np.random.default_rng(3).standard_normal((5, 4, SIZE)).astype(np.float32))
    got = quantized_paged_attention(query, cache, batch, row_format, scale=0.125, order_token=token, **options)
    expected = paged_attention(query, plain, batch, scale=0.125, **options)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-5, atol=1e-5)


def test_a_write_is_in_place():
    row_format = RowFormat(HEADS, SIZE, "int8", "int8")
    cache = mx.zeros((20_000, BLOCK, row_format.row_words), mx.uint32)
    key, value = map(mx.array, rows(3))
    mx.eval(cache, key, value)
    for step in range(3):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        slots = mx.array([4 + step, 900 + step, 7000 + step], mx.int32)
        cache, _ = quantized_reshape_and_cache(key, value, cache, slots, row_format)
        mx.eval(cache)
        assert mx.get_peak_memory() - before < cache.nbytes / 10


def test_what_does_not_fit_the_format_is_refused():
    row_format = RowFormat(HEADS, SIZE, "int8", "int8")
    cache = mx.zeros((4, BLOCK, row_format.row_words), mx.uint32)
    key, value = map(mx.array, rows(2))
    slots = mx.array([4, 5], mx.int32)
    batch = RaggedBatch(np.array([0, 1], np.int32), np.array([9], np.int32), np.array([[1, 2]], np.int32))
    query = mx.zeros((1, 4, SIZE))
    for misuse, message in (
        (lambda: quantized_reshape_and_cache(key, value, cache[..., 1:], slots, row_format), "got .*uint32 of shape"),
        (
            lambda: quantized_reshape_and_cache(key[:, :1], value[:, :1], cache, slots, row_format),
            "expected key of shape",
        ),
        (lambda: quantized_paged_attention(query, cache, batch, row_format, scale=1.0), "blocks for 9 tokens"),
        (lambda: quantized_paged_attention(query[:, :3], cache, batch, row_format, scale=1.0), "multiple of 2"),
        (lambda: quantized_gather_kv_cache(cache, mx.array([1], mx.int32), 5, row_format), "0 to 4"),
    ):
        with pytest.raises(MetalKernelsError, match=message):
            misuse()
