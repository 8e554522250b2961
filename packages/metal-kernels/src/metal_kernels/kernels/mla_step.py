"""Latent attention of a whole step: one-row requests in the decode kernel, the others over copied pages."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from metal_kernels import reference
from metal_kernels.decode_plan import MIN_LATENT_RANGE, plan_decode
from metal_kernels.device import target
from metal_kernels.kernels.dispatch import Accepted, LatentPrompts, LatentVariant, Rejected, expanded_prefill
from metal_kernels.kernels.mla_decode import mla_decode
from metal_kernels.kernels.mla_prefill import mla_prefill
from metal_kernels.kernels.own_pages import own_pages
from metal_kernels.kernels.split_step import split_step
from metal_kernels.latent_projections import LatentProjections
from metal_kernels.ragged import RaggedBatch


def mla_attention(
    query: Float[mx.array, "tokens q_heads query_size"],
    query_rope: Float[mx.array, "tokens q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    batch: RaggedBatch,
    decode: Accepted[LatentVariant] | Rejected,
    *,
    scale: float,
    order_token: mx.array | None = None,
    projections: LatentProjections | None = None,
) -> Float[mx.array, "tokens q_heads value_size"]:
    """Attend each row to its own request's latents; see :func:`metal_kernels.mla_attention`.

    Args:
        query: Absorbed queries of the step; with ``projections``, not absorbed.
        query_rope: Rotary parts of the queries.
        kv_cache: Pages of one layer, written in place before ``order_token``.
        batch: The step.
        decode: What serves the one-row requests; if nothing does, plain MLX does.
        scale: Factor on the scores.
        order_token: Of the last write.
        projections: Of the layer.
    """
    if batch.num_tokens == 0:
        return query if projections is None else projections.unabsorb(projections.absorb(query))
    split = split_step(batch, isinstance(decode, Accepted))
    outputs = []
    if isinstance(decode, Accepted) and split.singles.size:
        variant = decode.variant
        per_range = -(-query.shape[1] // variant.heads) * variant.simdgroups
        plan = batch.once(
            ("latent decode plan", per_range),
            lambda: plan_decode(batch, split.singles, None, per_range, MIN_LATENT_RANGE),
        )
        # The plan names rows of the step: where prompts are beside them, all are absorbed.
        absorbed = query if projections is None else projections.absorb(query)
        out = mla_decode(absorbed, query_rope, kv_cache, plan, variant, scale=scale, order_token=order_token)
        outputs.append(out if projections is None else projections.unabsorb(out))
    if split.others is not None:
        rows = (split.of_others(query), split.of_others(query_rope))
        outputs.append(_attend_prompts(*rows, kv_cache, split.others, scale, order_token, projections))
    return split.join(outputs)


def _attend_prompts(
    query: mx.array,
    query_rope: mx.array,
    kv_cache: mx.array,
    batch: RaggedBatch,
    scale: float,
    order_token: mx.array | None,
    projections: LatentProjections | None,
) -> mx.array:
    """Attend requests with several rows, over expanded keys and values where that is less work."""
    if projections is not None:
        sizes = (kv_cache.shape[2] - query_rope.shape[2], query.shape[2], query_rope.shape[2], projections.value_size)
        kind = (target(), query.dtype, kv_cache.dtype, query.shape[1], sizes)
        route = batch.once(("expanded prefill", kind), lambda: expanded_prefill(*kind, _prompts(batch, kv_cache)))
        if isinstance(route, Accepted):
            return mla_prefill(
                query,
                query_rope,
                kv_cache,
                batch,
                projections,
                route.variant,
                scale=scale,
                order_token=order_token,
            )
    pages, own = own_pages(kv_cache, batch, order_token)
    return reference.mla_attention(query, query_rope, pages, own, scale=scale, projections=projections)


def _prompts(batch: RaggedBatch, kv_cache: mx.array) -> LatentPrompts:
    rows, keys = batch.query_lens.astype(np.int64), batch.seq_lens.astype(np.int64)
    pairs = rows * (keys - rows) + rows * (rows + 1) // 2
    return LatentPrompts(
        reqs=batch.num_reqs,
        rows=int(rows.sum()),
        keys=int(keys.sum()),
        pairs=int(pairs.sum()),
        longest=batch.max_seq_len,
        block_size=kv_cache.shape[1],
    )
