"""Latent attention of requests that have one row each."""

from math import e, log2

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.kernels.dispatch import LatentVariant
from metal_kernels.kernels.join_ranges import join_ranges
from metal_kernels.kernels.source import PortableKernel, constants, order_input

_KERNEL = PortableKernel(
    "mla_decode",
    ("latent_in", "rope_in", "kv_cache_in", "block_table_in", "work_in", "factors_in", "order_in"),
    ("partial_out", "partial_stats"),
    "mla_decode.metal",
    headers=("matrix", "tiles", "tile_rows"),
)


def mla_decode(
    query_latent: Float[mx.array, "tokens q_heads latent_size"],
    query_rope: Float[mx.array, "tokens q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    plan: DecodePlan,
    variant: LatentVariant,
    *,
    scale: float,
    order_token: mx.array | None = None,
) -> Float[mx.array, "decodes q_heads latent_size"]:
    """Attend the rows of the plan's requests, in its order; see :func:`metal_kernels.mla_attention`.

    Args:
        query_latent: Absorbed queries of the step.
        query_rope: Rotary parts of the queries.
        kv_cache: Pages of one layer, in the queries' dtype.
        plan: Which keys each row sees.
        variant: From :func:`metal_kernels.kernels.mla_decode_kernel`.
        scale: Factor on the scores.
        order_token: Of the last write.
    """
    q_heads, latent_size = query_latent.shape[1:]
    partial = (plan.num_ranges, q_heads)
    weighted, stats = _KERNEL(
        [
            mx.contiguous(query_latent),
            mx.contiguous(query_rope if query_rope.size else query_latent),
            kv_cache,
            plan.block_table,
            plan.work,
            constants(scale * log2(e)),
            order_input(order_token),
        ],
        [((*partial, latent_size), mx.float32), ((*partial, 2), mx.float32)],
        threadgroups=(plan.num_ranges * -(-q_heads // variant.heads), 1),
        threads=variant.simdgroups * 32,
        template={
            "T": kv_cache.dtype,
            "Q_HEADS": q_heads,
            "LATENT": latent_size,
            "ROPE": query_rope.shape[2],
            "BLOCK_SIZE": kv_cache.shape[1],
            "KEYS": variant.keys,
            "SIMDGROUPS": variant.simdgroups,
        },
    )
    return join_ranges(weighted, stats, plan, None, query_latent.dtype)
