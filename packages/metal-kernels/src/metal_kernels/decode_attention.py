"""Attention of requests that have one row each."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from jaxtyping import Float

from metal_kernels import kernels, reference
from metal_kernels.checks import require_kv_cache, require_rows
from metal_kernels.decode_plan import DecodePlan
from metal_kernels.device import target


def decode_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    plan: DecodePlan,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend one row of each request to the keys that the plan names.

    What :func:`metal_kernels.paged_attention` does for such requests, for callers that make the plan themselves: its
    arrays may be inputs of a compiled step.

    Args:
        query: One row for each request, in the plan's order.
        kv_cache: Pages of one layer.
        plan: From :func:`metal_kernels.plan_decode` or :func:`metal_kernels.pack_decode`.
        scale: Factor on the scores.
        soft_cap: Scores ``s`` become ``soft_cap * tanh(s / soft_cap)``.
        sinks: One more logit per query head that joins the softmax and has no value.
        order_token: What the write of this step's keys returned, if it is not ``query``.

    Raises:
        MetalKernelsError: Shapes and the plan do not fit together.
    """
    require_kv_cache("decode_attention", kv_cache)
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    q_heads = query.shape[1]
    require_rows("decode_attention", "query", query, (plan.num_reqs, q_heads, head_size))
    attend: Callable[..., mx.array] = reference.decode_attention
    if kernels.move_pages(kv_cache):
        group = q_heads // kv_heads
        decode = kernels.decode_kernel(target(), query.dtype, kv_cache.dtype, head_size, block_size, group)
        if isinstance(decode, kernels.Accepted):
            attend = partial(kernels.paged_decode, variant=decode.variant)
    return attend(query, kv_cache, plan, scale=scale, soft_cap=soft_cap, sinks=sinks, order_token=order_token)
