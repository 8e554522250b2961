"""Attention of a whole step over quantised rows: one-row requests in the decode kernel, the others dequantised."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, UInt32

from metal_kernels import reference
from metal_kernels.decode_plan import plan_decode
from metal_kernels.kernels.dispatch import Accepted, QuantizedMatrixVariant, QuantizedVariant, Rejected
from metal_kernels.kernels.own_pages import own_pages
from metal_kernels.kernels.quantized_decode import quantized_decode
from metal_kernels.kernels.split_step import split_step
from metal_kernels.ragged import RaggedBatch
from metal_kernels.row_format import RowFormat


def quantized_paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    batch: RaggedBatch,
    row_format: RowFormat,
    decode: Accepted[QuantizedVariant] | Accepted[QuantizedMatrixVariant] | Rejected,
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
    if batch.num_tokens == 0:
        return query
    split = split_step(batch, isinstance(decode, Accepted))
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}
    outputs = []
    if isinstance(decode, Accepted) and split.singles.size:
        per_range = row_format.num_kv_heads * decode.variant.parts * decode.variant.simdgroups
        plan = batch.once(
            ("decode plan", sliding_window, per_range),
            lambda: plan_decode(batch, split.singles, sliding_window, per_range),
        )
        out = quantized_decode(query, kv_cache, plan, decode.variant, row_format, order_token=order_token, **options)
        outputs.append(out)
    if split.others is not None:
        words, own = own_pages(kv_cache.view(mx.float32), split.others, order_token)
        rows, pages = query[split.other_rows], words.view(mx.uint32)
        out = reference.quantized_paged_attention(
            rows, pages, own, row_format, sliding_window=sliding_window, **options
        )
        outputs.append(out)
    return split.join(outputs)
