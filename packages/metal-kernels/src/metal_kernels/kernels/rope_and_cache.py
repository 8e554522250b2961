"""Projected rows on their way to attention: normalised, rotated, and written into the cache in place."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.source import PortableKernel, constants

_SIMDGROUPS = 4
_KERNEL = PortableKernel(
    "rope_and_cache",
    ("qkv_in", "cos_sin_in", "q_norm_in", "k_norm_in", "factors_in", "slots_in", "kv_cache_in"),
    ("query_out",),
    "rope_and_cache.metal",
)


def rope_and_cache(
    qkv: Float[mx.array, "tokens qkv_size"],
    cos_sin: Float[mx.array, "tokens rotary_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "slots"],
    *,
    q_norm: Float[mx.array, "head_size"] | None = None,
    k_norm: Float[mx.array, "head_size"] | None = None,
    eps: float = 0.0,
    traditional: bool = False,
    gated: bool = False,
) -> tuple[Float[mx.array, "tokens q_heads head_size"], Float[mx.array, "blocks 2 block_size kv_heads head_size"]]:
    """Rotate and write rows; see :func:`metal_kernels.rope_and_cache`."""
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    tokens = qkv.shape[0]
    q_heads = (qkv.shape[1] // head_size - 2 * kv_heads) // (2 if gated else 1)
    heads = q_heads + 2 * kv_heads
    if tokens == 0:
        return mx.zeros((0, q_heads, head_size), qkv.dtype), kv_cache
    norm = q_norm is not None and k_norm is not None
    (query,) = _KERNEL(
        [
            qkv,
            mx.contiguous(cos_sin),
            constants(1.0) if q_norm is None else q_norm,
            constants(1.0) if k_norm is None else k_norm,
            constants(eps),
            slot_mapping,
            kv_cache,
        ],
        [((tokens, q_heads, head_size), qkv.dtype)],
        threadgroups=(tokens, -(-heads // _SIMDGROUPS)),
        threads=_SIMDGROUPS * 32,
        template={
            "T": qkv.dtype,
            "C": kv_cache.dtype,
            "Q_HEADS": q_heads,
            "KV_HEADS": kv_heads,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": block_size,
            "ROTARY": cos_sin.shape[1],
            "TRADITIONAL": traditional,
            "NORM": norm,
            "GATED": gated,
            "SIMDGROUPS": _SIMDGROUPS,
        },
    )
    return query, kv_cache
