"""Attention of requests that have one row each, over quantised keys and values."""

from math import gcd

import mlx.core as mx
from jaxtyping import Float, UInt32

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.kernels.dispatch import MatrixVariant, QuantizedVariant
from metal_kernels.kernels.paged_decode import MATRIX_HEADERS
from metal_kernels.kernels.quantized_cache_write import format_template
from metal_kernels.kernels.ranged_kernel import RangedKernel, score_factors
from metal_kernels.kernels.source import order_input
from metal_kernels.row_format import ELEMENT_BITS, ElementFormat, RowFormat

_INPUTS = ("query_in", "kv_cache_in", "block_table_in", "work_in", "factors_in", "order_in")
_KERNEL = RangedKernel.of("quantized_decode", _INPUTS, "quantized_decode.metal", {}, ("bits", "quantized"))
_MATRIX_KERNEL = RangedKernel.of(
    "quantized_matrix_decode",
    _INPUTS,
    "matrix_decode.metal",
    {"WRITES": 0, "QUANTIZED": 1},
    (*MATRIX_HEADERS, "bits", "pairs"),
)


def quantized_decode(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    plan: DecodePlan,
    variant: QuantizedVariant | MatrixVariant,
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
    template = format_template(row_format) | {
        "BLOCK_SIZE": kv_cache.shape[1],
        "GROUP": query.shape[1] // row_format.num_kv_heads,
        "SOFT_CAP": soft_cap is not None,
        **variant.template,
    }
    kernel = _MATRIX_KERNEL
    if isinstance(variant, QuantizedVariant):
        kernel = _KERNEL
        template |= {
            "KEY_VECTOR": _vector(row_format, row_format.key, variant.width, 0),
            "VALUE_VECTOR": _vector(row_format, row_format.value, variant.width, row_format.part_ends[0]),
        }
    factors = score_factors(scale, soft_cap)
    return kernel(
        [query, kv_cache, plan.block_table, plan.work, factors, order_input(order_token)],
        plan,
        (query.shape[1], row_format.head_size),
        query.dtype,
        sinks=sinks,
        template=template,
        per_range=row_format.num_kv_heads * variant.parts,
        threads=variant.simdgroups * 32,
    )


def _vector(row_format: RowFormat, element: ElementFormat, width: int, first_word: int) -> int:
    """Words that a lane may load at once: where its elements start is a multiple of it, in every row and head."""
    bits = ELEMENT_BITS[element]
    return gcd(4, row_format.row_words, first_word, row_format.head_size * bits // 32, width * bits // 32)
