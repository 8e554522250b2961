"""Quantised cache rows with plain MLX operations: written, read and attended to."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32, UInt32

from metal_kernels.device import target
from metal_kernels.ragged import RaggedBatch
from metal_kernels.reference.attention import Options, attend_groups
from metal_kernels.reference.plan import KeyGroup, plan_attention
from metal_kernels.row_format import ElementFormat, RowFormat

_FP8_MAX = 448.0
_INT8_MAX = 127.0
_INT4_MAX = 15.0
_FLOAT16_MAX = 65504.0
_FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def quantized_reshape_and_cache(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    slot_mapping: Int32[mx.array, "tokens"],
    row_format: RowFormat,
) -> tuple[UInt32[mx.array, "blocks block_size row_words"], mx.array]:
    """Quantise rows into their slots; see :func:`metal_kernels.quantized_reshape_and_cache`.

    Returns a new array; the order token orders nothing here. ``slot_mapping`` is read back to the host.
    """
    slots = np.asarray(slot_mapping)
    if slots.size == 0 or slots.min() < 0:
        kept = np.flatnonzero(slots >= 0)
        if kept.size == 0:
            return kv_cache, slot_mapping
        rows = mx.array(kept.astype(np.int32))
        key, value, slots = key[rows], value[rows], slots[kept]
    written = kv_cache.reshape(-1, kv_cache.shape[2])
    written[mx.array(slots)] = pack_rows(key, value, row_format)
    return written.reshape(kv_cache.shape), slot_mapping


def quantized_paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    batch: RaggedBatch,
    row_format: RowFormat,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend to dequantised keys and values; see :func:`metal_kernels.quantized_paged_attention`."""
    if batch.num_tokens == 0:
        return query
    _, block_size, row_words = kv_cache.shape
    plan = batch.once(
        ("reference rows", sliding_window, block_size),
        lambda: plan_attention(batch, sliding_window, block_size, 1, halves=1),
    )
    all_rows = kv_cache.reshape(-1, row_words)
    compute = mx.float32 if target() == "cpu" else query.dtype

    def fetch(group: KeyGroup) -> tuple[mx.array, mx.array]:
        keys, values = unpack_rows(all_rows[group.key_rows[:, 0]], row_format, compute)
        return keys.swapaxes(1, 2), values.swapaxes(1, 2)

    return attend_groups(query, plan, fetch, compute, Options(scale, soft_cap, sinks))


def quantized_gather_kv_cache(
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    block_table: Int32[mx.array, "max_blocks"],
    seq_len: int,
    row_format: RowFormat,
) -> tuple[Float[mx.array, "context kv_heads head_size"], Float[mx.array, "context kv_heads head_size"]]:
    """Return one request's keys and values in float32; see :func:`metal_kernels.quantized_gather_kv_cache`."""
    _, block_size, row_words = kv_cache.shape
    rows = kv_cache[block_table[: -(-seq_len // block_size)]].reshape(-1, row_words)[:seq_len]
    return unpack_rows(rows, row_format, mx.float32)


def pack_rows(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    row_format: RowFormat,
) -> UInt32[mx.array, "tokens row_words"]:
    """Return the rows that hold ``key`` and ``value``."""
    tokens = key.shape[0]
    key_data, key_scales = _quantize(key, row_format, row_format.key)
    value_data, value_scales = _quantize(value, row_format, row_format.value)
    padding = mx.zeros((tokens, row_format.row_words - row_format.content_words), mx.uint32)
    return mx.concatenate([key_data, value_data, *key_scales, *value_scales, padding], axis=1)


def unpack_rows(
    rows: UInt32[mx.array, "*batch row_words"], row_format: RowFormat, dtype: mx.Dtype
) -> tuple[Float[mx.array, "*batch kv_heads head_size"], Float[mx.array, "*batch kv_heads head_size"]]:
    """Return the keys and values that ``rows`` hold."""
    key_data, value_data, key_scales, value_scales, _ = mx.split(rows, list(row_format.part_ends), axis=-1)
    keys = _dequantize(key_data, key_scales, row_format, row_format.key, dtype)
    return keys, _dequantize(value_data, value_scales, row_format, row_format.value, dtype)


def _words(array: mx.array) -> mx.array:
    """Return ``array`` [tokens, …] as 32-bit words [tokens, words]."""
    return mx.contiguous(array.reshape(array.shape[0], -1)).view(mx.uint32)


def _quantize(x: mx.array, row_format: RowFormat, element: ElementFormat) -> tuple[mx.array, list[mx.array]]:
    """Return data and scale words of ``x`` [tokens, kv_heads, head_size]."""
    if element in _FLOATS:
        return _words(x.astype(_FLOATS[element])), []
    x = x.astype(mx.float32)
    if element == "int4":
        return _quantize_int4(x, row_format.group_size(element))
    largest = _FP8_MAX if element == "fp8_e4m3" else _INT8_MAX
    scale = mx.abs(x).max(axis=-1, keepdims=True) / largest
    scaled = x / mx.where(scale > 0, scale, 1)
    if element == "fp8_e4m3":
        data = mx.to_fp8(scaled)
    else:
        data = mx.clip(mx.round(scaled), -largest, largest).astype(mx.int8).view(mx.uint8)
    return _words(data), [_words(scale)]


def _quantize_int4(x: mx.array, group_size: int) -> tuple[mx.array, list[mx.array]]:
    groups = x.reshape(x.shape[0], -1, group_size)
    lowest = mx.clip(groups.min(axis=-1, keepdims=True), -_FLOAT16_MAX, _FLOAT16_MAX).astype(mx.float16)
    bias = lowest.astype(mx.float32)
    step = mx.minimum((groups.max(axis=-1, keepdims=True) - bias) / _INT4_MAX, _FLOAT16_MAX).astype(mx.float16)
    steps = step.astype(mx.float32)
    levels = mx.clip(mx.round((groups - bias) / mx.where(steps > 0, steps, 1)), 0, _INT4_MAX).astype(mx.uint8)
    pairs = levels.reshape(x.shape[0], -1, 2)
    return _words(pairs[..., 0] | (pairs[..., 1] << 4)), [_words(mx.concatenate([step, lowest], axis=-1))]


def _dequantize(
    data: mx.array, scales: mx.array, row_format: RowFormat, element: ElementFormat, dtype: mx.Dtype
) -> mx.array:
    """Undo ``_quantize`` for words [*batch, words]; the result is [*batch, kv_heads, head_size]."""
    shape = (*data.shape[:-1], row_format.num_kv_heads, row_format.head_size)
    data = mx.contiguous(data)
    if element in _FLOATS:
        return data.view(_FLOATS[element]).reshape(shape).astype(dtype)
    scales = mx.contiguous(scales)
    if element == "int4":
        pairs = data.view(mx.uint8)
        levels = mx.stack([pairs & 15, pairs >> 4], axis=-1)
        steps, bias = mx.split(scales.view(mx.float16).reshape(*scales.shape, 2).astype(mx.float32), 2, axis=-1)
        groups = levels.reshape(*scales.shape, row_format.group_size(element)).astype(mx.float32)
        return (groups * steps + bias).reshape(shape).astype(dtype)
    data = data.view(mx.uint8)
    elements = mx.from_fp8(data, dtype=mx.float32) if element == "fp8_e4m3" else data.view(mx.int8).astype(mx.float32)
    return (elements.reshape(shape) * scales.view(mx.float32)[..., None]).astype(dtype)
