"""Keys and values of requests that have one row each, written on the way through attention."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels
from metal_kernels.checks import require_kv_cache, require_rows
from metal_kernels.decode_attention import decode_attention
from metal_kernels.decode_plan import DecodePlan
from metal_kernels.device import target
from metal_kernels.reshape_and_cache import reshape_and_cache


def write_and_attend(
    query: Float[mx.array, "tokens q_heads head_size"],
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "slots"],
    plan: DecodePlan,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
) -> tuple[Float[mx.array, "tokens q_heads head_size"], Float[mx.array, "blocks 2 block_size kv_heads head_size"]]:
    """Do what ``reshape_and_cache`` and then ``decode_attention`` do to rows: in one kernel if one can.

    Args:
        query: One row for each request, in the plan's order.
        key: Keys of the rows.
        value: Their values.
        kv_cache: Pages of one layer.
        slot_mapping: Slot of each row: that of the last key which the plan names for the row, or -1. What follows the
            rows' slots is ignored; at least eight elements, which a device reads faster than fewer.
        plan: See :func:`metal_kernels.decode_attention`, as for all that is not said here.
        scale: Factor on the scores.
        soft_cap: Scores ``s`` become ``soft_cap * tanh(s / soft_cap)``.
        sinks: One more logit per query head that joins the softmax and has no value.

    Returns:
        The attention of each row, which orders later reads after the write, and the cache that holds the rows.

    Raises:
        MetalKernelsError: Shapes and the plan do not fit together.
    """
    require_kv_cache("write_and_attend", kv_cache)
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    require_rows("write_and_attend", "query", query, (plan.num_reqs, query.shape[1], head_size))
    for name, rows in (("key", key), ("value", value)):
        require_rows("write_and_attend", name, rows, (plan.num_reqs, kv_heads, head_size))
    if kernels.move_pages(kv_cache):
        kind = (target(), query.dtype, kv_cache.dtype, head_size, block_size, query.shape[1] // kv_heads)
        decode = kernels.write_decode_kernel(*kind)
        if isinstance(decode, kernels.Accepted):
            options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}
            variant = decode.variant
            return kernels.write_decode(query, key, value, kv_cache, slot_mapping, plan, variant, **options), kv_cache
    written, order_token = reshape_and_cache(key, value, kv_cache, slot_mapping[: plan.num_reqs])
    out = decode_attention(query, written, plan, scale=scale, soft_cap=soft_cap, sinks=sinks, order_token=order_token)
    return out, written
