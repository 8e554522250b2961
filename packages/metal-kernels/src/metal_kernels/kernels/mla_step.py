"""Latent attention of a whole step: one-row requests in the decode kernel, the others over copied pages."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels import reference
from metal_kernels.decode_plan import MIN_LATENT_RANGE, plan_decode
from metal_kernels.kernels.dispatch import Accepted, LatentVariant, Rejected
from metal_kernels.kernels.mla_decode import mla_decode
from metal_kernels.kernels.own_pages import own_pages
from metal_kernels.kernels.split_step import split_step
from metal_kernels.ragged import RaggedBatch


def mla_attention(
    query_latent: Float[mx.array, "tokens q_heads latent_size"],
    query_rope: Float[mx.array, "tokens q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    batch: RaggedBatch,
    decode: Accepted[LatentVariant] | Rejected,
    *,
    scale: float,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads latent_size"]:
    """Attend each row to its own request's latents; see :func:`metal_kernels.mla_attention`.

    Args:
        query_latent: Absorbed queries of the step.
        query_rope: Rotary parts of the queries.
        kv_cache: Pages of one layer, written in place before ``order_token``.
        batch: The step.
        decode: What serves the one-row requests; if nothing does, plain MLX does.
        scale: Factor on the scores.
        order_token: Of the last write.
    """
    if batch.num_tokens == 0:
        return query_latent
    split = split_step(batch, isinstance(decode, Accepted))
    outputs = []
    if isinstance(decode, Accepted) and split.singles.size:
        variant = decode.variant
        per_range = -(-query_latent.shape[1] // variant.heads) * variant.simdgroups
        plan = batch.once(
            ("latent decode plan", per_range),
            lambda: plan_decode(batch, split.singles, None, per_range, MIN_LATENT_RANGE),
        )
        outputs.append(
            mla_decode(query_latent, query_rope, kv_cache, plan, variant, scale=scale, order_token=order_token)
        )
    if split.others is not None:
        pages, own = own_pages(kv_cache, split.others, order_token)
        rows = (query_latent[split.other_rows], query_rope[split.other_rows])
        outputs.append(reference.mla_attention(*rows, pages, own, scale=scale))
    return split.join(outputs)
