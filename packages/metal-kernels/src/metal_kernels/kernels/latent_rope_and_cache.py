"""Projected rows on their way to latent attention: rotated, and written into the cache in place."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.source import PortableKernel, constants

_SIMDGROUPS = 4
_KERNEL = PortableKernel(
    "latent_rope_and_cache",
    ("query_in", "latent_in", "cos_sin_in", "norm_in", "factors_in", "slots_in", "kv_cache_in"),
    ("rope_out",),
    "latent_rope_and_cache.metal",
)


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
    """Rotate and write rows; see :func:`metal_kernels.latent_rope_and_cache`."""
    tokens, rope_size = cos_sin.shape
    nope_size = query.shape[1] // q_heads - rope_size
    (rope,) = _KERNEL(
        [query, latent, mx.contiguous(cos_sin), norm, constants(eps), slot_mapping, kv_cache],
        [((tokens, q_heads, rope_size), query.dtype)],
        threadgroups=(tokens, -(-(q_heads + 1) // _SIMDGROUPS)),
        threads=_SIMDGROUPS * 32,
        template={
            "T": query.dtype,
            "C": kv_cache.dtype,
            "Q_HEADS": q_heads,
            "NOPE": nope_size,
            "ROPE": rope_size,
            "LATENT": kv_cache.shape[2] - rope_size,
            "TRADITIONAL": traditional,
            "SIMDGROUPS": _SIMDGROUPS,
        },
    )
    return rope, kv_cache
