"""Attention of requests that have one row each, over quantised keys and values."""

from math import e, gcd, log2

import mlx.core as mx
from jaxtyping import Float, UInt32

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.kernels.dispatch import QuantizedMatrixVariant, QuantizedVariant
from metal_kernels.kernels.join_ranges import join_ranges
from metal_kernels.kernels.quantized_cache_write import format_template
from metal_kernels.kernels.source import PortableKernel, constants, order_input
from metal_kernels.row_format import ELEMENT_BITS, ElementFormat, RowFormat

_KERNEL = PortableKernel(
    "quantized_decode",
    ("query_in", "kv_cache_in", "block_table_in", "work_in", "factors_in", "order_in"),
    ("partial_out", "partial_stats"),
    "quantized_decode.metal",
    headers=("bits", "quantized"),
)
_MATRIX_KERNEL = PortableKernel(
    "quantized_matrix_decode",
    ("query_in", "kv_cache_in", "block_table_in", "work_in", "factors_in", "order_in"),
    ("partial_out", "partial_stats"),
    "quantized_matrix_decode.metal",
    headers=("bits", "pairs", "matrix", "tiles", "tile_columns"),
)


def quantized_decode(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    plan: DecodePlan,
    variant: QuantizedVariant | QuantizedMatrixVariant,
    row_format: RowFormat,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "decodes q_heads head_size"]:
    """Attend the rows of the plan's requests, in its order; see :func:`metal_kernels.quantized_paged_attention`.

    Args:
        query: Rows of the step, strided as they may be.
        kv_cache: Pages of one layer.
        plan: Which keys each row sees.
        variant: From :func:`metal_kernels.kernels.quantized_decode_kernel`.
        row_format: How a row of the cache is laid out.
        scale: Factor on the scores.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
    """
    q_heads, head_size = query.shape[1:]
    factors = (scale * log2(e), 0.0) if soft_cap is None else (scale / soft_cap, soft_cap * log2(e))
    partial = (plan.num_ranges, q_heads)
    template = format_template(row_format) | {
        "BLOCK_SIZE": kv_cache.shape[1],
        "GROUP": q_heads // row_format.num_kv_heads,
        "HEADS": variant.heads,
        "SIMDGROUPS": variant.simdgroups,
        "SOFT_CAP": soft_cap is not None,
    }
    if isinstance(variant, QuantizedVariant):
        template |= {
            "LANES": variant.lanes,
            "WIDTH": variant.width,
            "UNROLLED": variant.unrolled,
            "KEY_VECTOR": _vector(row_format, row_format.key, variant.width, 0),
            "VALUE_VECTOR": _vector(row_format, row_format.value, variant.width, row_format.part_ends[0]),
        }
    weighted, stats = (_KERNEL if isinstance(variant, QuantizedVariant) else _MATRIX_KERNEL)(
        [query, kv_cache, plan.block_table, plan.work, constants(*factors), order_input(order_token)],
        [((*partial, head_size), mx.float32), ((*partial, 2), mx.float32)],
        threadgroups=(plan.num_ranges * row_format.num_kv_heads * variant.parts, 1),
        threads=variant.simdgroups * 32,
        template=template,
    )
    return join_ranges(weighted, stats, plan, sinks, query.dtype)


def _vector(row_format: RowFormat, element: ElementFormat, width: int, first_word: int) -> int:
    """Words that a lane may load at once: where its elements start is a multiple of it, in every row and head."""
    bits = ELEMENT_BITS[element]
    return gcd(4, row_format.row_words, first_word, row_format.head_size * bits // 32, width * bits // 32)
