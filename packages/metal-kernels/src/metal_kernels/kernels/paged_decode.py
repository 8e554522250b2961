"""Attention of requests that have one row each."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.kernels.dispatch import DecodeVariant, MatrixVariant
from metal_kernels.kernels.ranged_kernel import RangedKernel, score_factors
from metal_kernels.kernels.source import constants, order_input

MATRIX_HEADERS = ("words", "matrix", "fragments")
_CACHED = ("kv_cache_in", "block_table_in", "work_in", "factors_in")
# What a row brings along, by the body's WRITES: nothing, its own key and value, or all three as they are projected.
_INPUTS = {
    "paged_decode": ("query_in", *_CACHED, "order_in"),
    "write_decode": ("query_in", "key_in", "value_in", "slots_in", *_CACHED),
    "rope_decode": ("qkv_in", "cos_sin_in", "q_norm_in", "k_norm_in", "slots_in", *_CACHED),
}
_KERNELS = {
    name: RangedKernel.of(name, inputs, "paged_decode.metal", {"WRITES": writes}, ("words",))
    for writes, (name, inputs) in enumerate(_INPUTS.items())
}
_MATRIX_KERNELS = {
    name: RangedKernel.of(
        f"matrix_{name}", inputs, "matrix_decode.metal", {"WRITES": writes, "QUANTIZED": 0}, MATRIX_HEADERS
    )
    for writes, (name, inputs) in enumerate(_INPUTS.items())
}


def paged_decode(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    plan: DecodePlan,
    variant: DecodeVariant | MatrixVariant,
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
    template: dict[str, int | mx.Dtype] = {"SOFT_CAP": soft_cap is not None}
    after = [score_factors(scale, soft_cap), order_input(order_token)]
    q_heads = query.shape[1]
    return _attend("paged_decode", [query], after, kv_cache, plan, variant, q_heads, query.dtype, template, sinks)


def write_decode(
    query: Float[mx.array, "tokens q_heads head_size"],
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "slots"],
    plan: DecodePlan,
    variant: DecodeVariant | MatrixVariant,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
) -> Float[mx.array, "decodes q_heads head_size"]:
    """Write each row's key and value, and attend the rows; see :func:`metal_kernels.write_and_attend`.

    Args:
        query: Rows of the step, strided as they may be.
        key: Keys of the rows, likewise.
        value: Values of the rows, likewise.
        kv_cache: Pages of one layer.
        slot_mapping: Slot of each row, the one of the last key that the plan names for it; negative ones are skipped.
        plan: Which keys each row sees.
        variant: From :func:`metal_kernels.kernels.write_decode_kernel`.
        scale: Factor on the scores.
        soft_cap: Cap of the scores.
        sinks: Extra logit per query head.
    """
    before = [query, key.astype(kv_cache.dtype), value.astype(kv_cache.dtype), slot_mapping]
    template: dict[str, int | mx.Dtype] = {"SOFT_CAP": soft_cap is not None}
    after = [score_factors(scale, soft_cap)]
    q_heads = query.shape[1]
    return _attend("write_decode", before, after, kv_cache, plan, variant, q_heads, query.dtype, template, sinks)


def rope_decode(
    qkv: Float[mx.array, "tokens qkv_size"],
    cos_sin: Float[mx.array, "tokens head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "slots"],
    plan: DecodePlan,
    variant: DecodeVariant | MatrixVariant,
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
    norms = [constants(1.0) if norm is None else norm for norm in (q_norm, k_norm)]
    template: dict[str, int | mx.Dtype] = {
        "SOFT_CAP": False,
        "T": qkv.dtype,
        "NORM": q_norm is not None and k_norm is not None,
    }
    q_heads = qkv.shape[1] // kv_cache.shape[4] - 2 * kv_cache.shape[3]
    before = [qkv, cos_sin, *norms, slot_mapping]
    after = [score_factors(scale, None, eps)]
    return _attend("rope_decode", before, after, kv_cache, plan, variant, q_heads, qkv.dtype, template, None)


def _attend(
    name: str,
    before: list[mx.array],
    after: list[mx.array],
    kv_cache: mx.array,
    plan: DecodePlan,
    variant: DecodeVariant | MatrixVariant,
    q_heads: int,
    dtype: mx.Dtype,
    template: dict[str, int | mx.Dtype],
    sinks: mx.array | None,
) -> mx.array:
    """Launch the body of the variant, between whose inputs ``before`` and ``after`` are the cache and the plan."""
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    template = template | {
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        "KV_HEADS": kv_heads,
        "GROUP": q_heads // kv_heads,
        "C": kv_cache.dtype,
        **variant.template,
    }
    kernels = _KERNELS if isinstance(variant, DecodeVariant) else _MATRIX_KERNELS
    return kernels[name](
        [*before, kv_cache, plan.block_table, plan.work, *after],
        plan,
        (q_heads, head_size),
        dtype,
        sinks=sinks,
        template=template,
        per_range=kv_heads * variant.parts,
        threads=variant.simdgroups * 32,
    )
