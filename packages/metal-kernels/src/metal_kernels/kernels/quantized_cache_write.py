"""New keys and values, quantised into the cache in place."""

import mlx.core as mx
from jaxtyping import Float, Int32, UInt32

from metal_kernels.kernels.source import PortableKernel
from metal_kernels.row_format import ElementFormat, RowFormat

FORMATS: dict[ElementFormat, int] = {"int8": 0, "fp8_e4m3": 1, "int4": 2, "float16": 3, "bfloat16": 4, "float32": 5}

_SIMDGROUPS = 4
_KERNEL = PortableKernel(
    "quantized_cache_write",
    ("key_in", "value_in", "kv_cache_in", "slots_in"),
    ("order_out",),
    "quantized_cache_write.metal",
    headers=("bits", "quantized", "quantized_store"),
)


def quantized_reshape_and_cache(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    slot_mapping: Int32[mx.array, "tokens"],
    row_format: RowFormat,
) -> tuple[UInt32[mx.array, "blocks block_size row_words"], mx.array]:
    """Quantise rows into their slots; see :func:`metal_kernels.quantized_reshape_and_cache`.

    Returns the same array, changed once the order token is evaluated. ``kv_cache`` owns contiguous memory.
    """
    tokens = slot_mapping.size
    if tokens == 0:
        return kv_cache, slot_mapping
    (order_token,) = _KERNEL(
        [key, value, kv_cache, mx.contiguous(slot_mapping)],
        [((8,), mx.int32)],
        threadgroups=(tokens, -(-2 * row_format.num_kv_heads // _SIMDGROUPS)),
        threads=_SIMDGROUPS * 32,
        template={**format_template(row_format), "SIMDGROUPS": _SIMDGROUPS},
    )
    return kv_cache, order_token


def format_template(row_format: RowFormat) -> dict[str, int | mx.Dtype]:
    """Return the template values that say how a row is laid out; scales are counted per head."""
    heads = row_format.num_kv_heads
    return {
        "KV_HEADS": heads,
        "HEAD_SIZE": row_format.head_size,
        "ROW_WORDS": row_format.row_words,
        "KEY_FORMAT": FORMATS[row_format.key],
        "VALUE_FORMAT": FORMATS[row_format.value],
        "KEY_SCALES": row_format.scale_words(row_format.key) // heads,
        "VALUE_SCALES": row_format.scale_words(row_format.value) // heads,
    }
