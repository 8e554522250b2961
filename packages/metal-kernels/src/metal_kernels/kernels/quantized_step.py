"""Attention of a whole step over quantised rows: one-row requests in the decode kernel, the others dequantised."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, UInt32

from metal_kernels import reference
from metal_kernels.kernels.dispatch import Accepted, MatrixVariant, QuantizedVariant, Rejected
from metal_kernels.kernels.own_pages import own_pages
from metal_kernels.kernels.quantized_decode import quantized_decode
from metal_kernels.kernels.split_step import SplitStep, attend_split
from metal_kernels.ragged import RaggedBatch
from metal_kernels.row_format import RowFormat


def quantized_paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    batch: RaggedBatch,
    row_format: RowFormat,
    decode: Accepted[QuantizedVariant | MatrixVariant] | Rejected,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend each row to its own request's keys; see :func:`metal_kernels.quantized_paged_attention`.

    Args:
        query: Rows of the step.
        kv_cache: Pages of one layer, written in place before ``order_token``.
        batch: The step.
        row_format: How a row of the cache is laid out.
        decode: What serves the one-row requests; if nothing does, plain MLX does.
        scale: Factor on the scores.
        sliding_window: Keys a row sees at most.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
    """
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}

    def others(split: SplitStep, batch: RaggedBatch) -> mx.array:
        words, own = own_pages(kv_cache.view(mx.float32), batch, order_token)
        rows, pages = split.of_others(query), words.view(mx.uint32)
        return reference.quantized_paged_attention(
            rows, pages, own, row_format, sliding_window=sliding_window, **options
        )

    return attend_split(
        query,
        batch,
        row_format.num_kv_heads,
        sliding_window,
        decode,
        lambda plan, variant: quantized_decode(
            query, kv_cache, plan, variant, row_format, order_token=order_token, **options
        ),
        others,
    )
