"""Latent attention of requests that have one row each, around its matmuls."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_latent_cache, require_rows
from metal_kernels.decode_plan import DecodePlan
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError


def latent_rope_and_cache(
    query: Float[mx.array, "tokens query_size"],
    latent: Float[mx.array, "tokens row_size"],
    cos_sin: Float[mx.array, "tokens rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    slot_mapping: Int32[mx.array, "slots"],
    *,
    q_heads: int,
    norm: Float[mx.array, "latent_size"],
    eps: float,
    traditional: bool = False,
) -> tuple[
    Float[mx.array, "tokens q_heads rope_size"],
    Float[mx.array, "blocks block_size row_size"],
]:
    """Rotate the rotary parts of queries, and write normed latents and rotated keys at their slots.

    The rotated queries are the order token of the write: attention that takes them sees the rows. The cache is
    written as :func:`metal_kernels.concat_and_cache_mla` writes it.

    Args:
        query: All heads of each row: the part that meets latents, then the rotary part. Its last axis is contiguous.
        latent: Each row's latent, then its rotary key; likewise.
        cos_sin: Cosines, then sines, of the angle of each rotated pair, in float32.
        kv_cache: Pages of one layer.
        slot_mapping: Slot of each row; rows with a negative slot are not written. May be longer than ``query``.
        q_heads: Heads of ``query``.
        norm: Weight of the latents' root-mean-square norm.
        eps: Added to the mean square.
        traditional: Whether a pair is two neighbours, not elements half the rotary size apart.

    Returns:
        The rotated parts; the cache.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    require_latent_cache("latent_rope_and_cache", kv_cache)
    (tokens, rope_size), row_size = cos_sin.shape, kv_cache.shape[2]
    require_rows("latent_rope_and_cache", "latent", latent, (tokens, row_size))
    require_rows("latent_rope_and_cache", "norm", norm, (row_size - rope_size,))
    if query.shape[0] != tokens or query.shape[1] % q_heads or query.shape[1] // q_heads <= rope_size or rope_size % 2:
        raise MetalKernelsError(
            f"[latent_rope_and_cache] expected queries of {q_heads} heads, each of them more than the {rope_size} "
            f"elements that are rotated in pairs, for {tokens} rows, got {query.shape}. Pass what the projection made."
        )
    if slot_mapping.size < tokens:
        raise MetalKernelsError(
            f"[latent_rope_and_cache] expected a slot for each of {tokens} rows, got {slot_mapping.size}. Pad with -1."
        )
    in_place = tokens > 0 and kernels.move_pages(kv_cache)
    write = kernels.latent_rope_and_cache if in_place else reference.latent_rope_and_cache
    angles = cos_sin.astype(mx.float32)
    return write(
        query, latent, angles, kv_cache, slot_mapping, q_heads=q_heads, norm=norm, eps=eps, traditional=traditional
    )


def latent_decode(
    query_latent: Float[mx.array, "tokens q_heads latent_size"],
    query_rope: Float[mx.array, "tokens q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    plan: DecodePlan,
    *,
    scale: float,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads latent_size"]:
    """Attend one row of each request to the latents that the plan names.

    What :func:`metal_kernels.mla_attention` does for such requests, for callers that make the plan themselves.

    Args:
        query_latent: Absorbed queries, one row for each request, in the plan's order.
        query_rope: Rotary parts of the queries.
        kv_cache: Pages of one layer.
        plan: From :func:`metal_kernels.plan_decode` or :func:`metal_kernels.pack_decode`.
        scale: Factor on the scores.
        order_token: What the write of this step's rows returned, if it is not ``query_rope``.

    Raises:
        MetalKernelsError: Shapes and the plan do not fit together.
    """
    require_latent_cache("latent_decode", kv_cache)
    q_heads, latent_size = query_latent.shape[1:]
    rope_size = kv_cache.shape[2] - latent_size
    require_rows("latent_decode", "query_latent", query_latent, (plan.num_reqs, q_heads, latent_size))
    require_rows("latent_decode", "query_rope", query_rope, (plan.num_reqs, q_heads, rope_size))
    attend: Callable[..., mx.array] = reference.latent_decode
    if kernels.move_pages(kv_cache):
        decode = kernels.mla_decode_kernel(target(), query_latent.dtype, kv_cache.dtype, latent_size, rope_size)
        if isinstance(decode, kernels.Accepted):
            attend = partial(kernels.mla_decode, variant=decode.variant)
    return attend(query_latent, query_rope, kv_cache, plan, scale=scale, order_token=order_token)
