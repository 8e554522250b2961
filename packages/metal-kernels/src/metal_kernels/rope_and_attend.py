"""Projected rows of requests that have one row each, on their way through attention."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels
from metal_kernels.decode_attention import decode_attention
from metal_kernels.decode_plan import DecodePlan
from metal_kernels.device import target
from metal_kernels.rope_and_cache import rope_and_cache


def rope_and_attend(
    qkv: Float[mx.array, "tokens qkv_size"],
    cos_sin: Float[mx.array, "tokens rotary_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "slots"],
    plan: DecodePlan,
    *,
    scale: float,
    q_norm: Float[mx.array, "head_size"] | None = None,
    k_norm: Float[mx.array, "head_size"] | None = None,
    eps: float = 0.0,
    traditional: bool = False,
) -> tuple[Float[mx.array, "tokens q_heads head_size"], Float[mx.array, "blocks 2 block_size kv_heads head_size"]]:
    """Do what ``rope_and_cache`` does to rows, and attend them as ``decode_attention`` does: in one kernel if one can.

    Args:
        qkv: See :func:`metal_kernels.rope_and_cache`, as for all that is not said here.
        cos_sin: Cosines, then sines.
        kv_cache: Pages of one layer.
        slot_mapping: Slot of each row: that of the last key which the plan names for the row, or -1.
        plan: See :func:`metal_kernels.decode_attention`.
        scale: Factor on the scores.
        q_norm: Weight of the norm of query heads.
        k_norm: Weight of that of key heads.
        eps: Of both.
        traditional: Whether neighbours rotate together.

    Returns:
        The attention of each row, which orders later reads after the write, and the cache that holds the rows.

    Raises:
        MetalKernelsError: Shapes and the plan do not fit together.
    """
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    if kernels.move_pages(kv_cache) and qkv.shape[0] == plan.num_reqs:
        group = qkv.shape[1] // head_size // kv_heads - 2
        kind = (target(), qkv.dtype, kv_cache.dtype, head_size, block_size, group, cos_sin.shape[1], traditional)
        decode = kernels.rope_decode_kernel(*kind)
        if isinstance(decode, kernels.Accepted):
            norms: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
            rows, turns = mx.contiguous(qkv), mx.contiguous(cos_sin.astype(mx.float32))
            out = kernels.rope_decode(rows, turns, kv_cache, slot_mapping, plan, decode.variant, scale=scale, **norms)
            return out, kv_cache
    query, written = rope_and_cache(
        qkv, cos_sin, kv_cache, slot_mapping, q_norm=q_norm, k_norm=k_norm, eps=eps, traditional=traditional
    )
    return decode_attention(query, written, plan, scale=scale), written
