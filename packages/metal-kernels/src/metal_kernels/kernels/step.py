"""Attention of a whole step: one-row requests in the decode kernel, the others as prefill."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.kernels.dispatch import Accepted, DecodeVariant, MatrixVariant, Rejected
from metal_kernels.kernels.paged_decode import paged_decode
from metal_kernels.kernels.prefill import prefill
from metal_kernels.kernels.split_step import SplitStep, attend_split
from metal_kernels.ragged import RaggedBatch


def paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    decode: Accepted[DecodeVariant | MatrixVariant] | Rejected,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
    key: Float[mx.array, "tokens kv_heads head_size"] | None = None,
    value: Float[mx.array, "tokens kv_heads head_size"] | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend each row to its own request's keys; see :func:`metal_kernels.paged_attention`.

    Args:
        query: Rows of the step.
        kv_cache: Pages of one layer, written in place before ``order_token``.
        batch: The step.
        decode: What serves the one-row requests; if nothing does, they count as prefill.
        scale: Factor on the scores.
        sliding_window: Keys a row sees at most.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
        key: The step's own keys, as written.
        value: Its values, likewise.
    """
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks, "order_token": order_token}

    def others(split: SplitStep, batch: RaggedBatch) -> mx.array:
        own: dict[str, Any] = {}
        if key is not None and value is not None:
            own = {"key": split.of_others(key), "value": split.of_others(value)}
        return prefill(split.of_others(query), kv_cache, batch, sliding_window=sliding_window, **options, **own)

    return attend_split(
        query,
        batch,
        kv_cache.shape[3],
        sliding_window,
        decode,
        lambda plan, variant: paged_decode(query, kv_cache, plan, variant, **options),
        others,
    )
