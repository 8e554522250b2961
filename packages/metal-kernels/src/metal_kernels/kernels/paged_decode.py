"""Attention of requests that have one row each."""

from math import e, log2
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.kernels.dispatch import DecodeVariant
from metal_kernels.kernels.join_ranges import join_ranges
from metal_kernels.kernels.source import PortableKernel, constants, order_input

_INPUTS = ("query_in", "kv_cache_in", "block_table_in", "work_in", "factors_in", "order_in")
_BODY = "paged_decode.metal"
_PARTIAL = ("partial_out", "partial_stats")


def _defines(direct: int, writes: int) -> str:
    return f"#define DIRECT {direct}\n#define WRITES {writes}\n"


_DIRECT = PortableKernel("paged_decode_direct", (*_INPUTS, "sinks_in"), ("out",), _BODY, _defines(1, 0))
_SPLIT = PortableKernel("paged_decode_split", _INPUTS, _PARTIAL, _BODY, _defines(0, 0))
_ROWS = ("qkv_in", "cos_sin_in", "q_norm_in", "k_norm_in", "slots_in", *_INPUTS[1:-1])
_ROPE_DIRECT = PortableKernel("rope_decode_direct", (*_ROWS, "sinks_in"), ("out",), _BODY, _defines(1, 1))
_ROPE_SPLIT = PortableKernel("rope_decode_split", _ROWS, _PARTIAL, _BODY, _defines(0, 1))


def paged_decode(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    plan: DecodePlan,
    variant: DecodeVariant,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "decodes q_heads head_size"]:
    """Attend the rows of the plan's requests, in its order; see :func:`metal_kernels.decode_attention`.

    Args:
        query: Rows of the step, strided as they may be.
        kv_cache: Pages of one layer.
        plan: Which keys each row sees.
        variant: From :func:`metal_kernels.kernels.decode_kernel`.
        scale: Factor on the scores.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
        order_token: Of the last write.
    """
    q_heads, head_size = query.shape[1:]
    factors = (scale * log2(e), 0.0) if soft_cap is None else (scale / soft_cap, soft_cap * log2(e))
    inputs = [query, kv_cache, plan.block_table, plan.work, constants(*factors), order_input(order_token)]
    template = _template(kv_cache, q_heads, variant, soft_cap is not None)
    threadgroups = (plan.num_ranges * kv_cache.shape[3] * variant.parts, 1)
    threads = variant.simdgroups * 32
    if plan.direct:
        return _DIRECT(
            [*inputs, constants(0.0) if sinks is None else sinks.astype(mx.float32)],
            [((plan.num_reqs, q_heads, head_size), query.dtype)],
            template=template | {"T": query.dtype, "SINKS": sinks is not None},
            threadgroups=threadgroups,
            threads=threads,
        )[0]
    partial = (plan.num_ranges, q_heads)
    weighted, stats = _SPLIT(
        inputs,
        [((*partial, head_size), mx.float32), ((*partial, 2), mx.float32)],
        template=template,
        threadgroups=threadgroups,
        threads=threads,
    )
    return join_ranges(weighted, stats, plan, sinks, query.dtype)


def rope_decode(
    qkv: Float[mx.array, "tokens qkv_size"],
    cos_sin: Float[mx.array, "tokens head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "slots"],
    plan: DecodePlan,
    variant: DecodeVariant,
    *,
    scale: float,
    q_norm: Float[mx.array, "head_size"] | None = None,
    k_norm: Float[mx.array, "head_size"] | None = None,
    eps: float = 0.0,
) -> Float[mx.array, "decodes q_heads head_size"]:
    """Rotate, write and attend rows; see :func:`metal_kernels.rope_and_attend`.

    Args:
        qkv: Contiguous rows, in the plan's order and in the dtype of the cache.
        cos_sin: Of whole heads, of which halves rotate together.
        kv_cache: Pages of one layer.
        slot_mapping: Slot of each row, the one of the last key that the plan names for it; negative ones are skipped.
        plan: Which keys each row sees.
        variant: From :func:`metal_kernels.kernels.rope_decode_kernel`.
        scale: Factor on the scores.
        q_norm: Weight of the norm of query heads.
        k_norm: Weight of that of key heads.
        eps: Of both.
    """
    _, _, _, kv_heads, head_size = kv_cache.shape
    q_heads = qkv.shape[1] // head_size - 2 * kv_heads
    norm = q_norm is not None and k_norm is not None
    inputs = [
        qkv,
        cos_sin,
        constants(1.0) if q_norm is None else q_norm,
        constants(1.0) if k_norm is None else k_norm,
        slot_mapping,
        kv_cache,
        plan.block_table,
        plan.work,
        constants(scale * log2(e), 0.0, eps),
    ]
    template = _template(kv_cache, q_heads, variant, soft_cap=False) | {"T": qkv.dtype, "NORM": norm}
    launch: dict[str, Any] = {
        "threadgroups": (plan.num_ranges * kv_heads * variant.parts, 1),
        "threads": variant.simdgroups * 32,
    }
    if plan.direct:
        shape = (plan.num_reqs, q_heads, head_size)
        inputs.append(constants(0.0))
        return _ROPE_DIRECT(inputs, [(shape, qkv.dtype)], template=template | {"SINKS": False}, **launch)[0]
    partial = (plan.num_ranges, q_heads)
    outputs = [((*partial, head_size), mx.float32), ((*partial, 2), mx.float32)]
    weighted, stats = _ROPE_SPLIT(inputs, outputs, template=template, **launch)
    return join_ranges(weighted, stats, plan, None, qkv.dtype)


def _template(kv_cache: mx.array, q_heads: int, variant: DecodeVariant, soft_cap: bool) -> dict[str, int | mx.Dtype]:
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    return {
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        "KV_HEADS": kv_heads,
        "GROUP": q_heads // kv_heads,
        "HEADS": variant.heads,
        "LANES": variant.lanes,
        "SIMDGROUPS": variant.simdgroups,
        "UNROLLED": variant.unrolled,
        "AHEAD": variant.ahead,
        "C": kv_cache.dtype,
        "SOFT_CAP": soft_cap,
    }
