"""Attention of a whole step: one-row requests in the decode kernel, the others as prefill."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.decode_plan import plan_decode
from metal_kernels.kernels.dispatch import Accepted, DecodeVariant, Rejected
from metal_kernels.kernels.paged_decode import paged_decode
from metal_kernels.kernels.prefill import prefill
from metal_kernels.kernels.split_step import split_step
from metal_kernels.ragged import RaggedBatch


def paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    decode: Accepted[DecodeVariant] | Rejected,
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
    if batch.num_tokens == 0:
        return query
    split = split_step(batch, isinstance(decode, Accepted))
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks, "order_token": order_token}
    outputs = []
    if isinstance(decode, Accepted) and split.singles.size:
        per_range = kv_cache.shape[3] * decode.variant.parts * decode.variant.simdgroups
        plan = batch.once(
            ("decode plan", sliding_window, per_range),
            lambda: plan_decode(batch, split.singles, sliding_window, per_range),
        )
        outputs.append(paged_decode(query, kv_cache, plan, decode.variant, **options))
    if split.others is not None:
        rows = query[split.other_rows]
        own: dict[str, Any] = {}
        if key is not None and value is not None:
            own = {"key": key[split.other_rows], "value": value[split.other_rows]}
        outputs.append(prefill(rows, kv_cache, split.others, sliding_window=sliding_window, **options, **own))
    return split.join(outputs)
