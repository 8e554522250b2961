"""Projected rows on their way to attention."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_kv_cache, require_rows
from metal_kernels.errors import MetalKernelsError


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
    """Normalise and rotate queries and keys, and write keys and values at their slots.

    The rotated query is the order token of the write: attention that takes it as query, or as order token, sees the
    rows. The cache is written as :func:`metal_kernels.reshape_and_cache` writes it.

    Args:
        qkv: All query heads, then all key heads, then all value heads of each row.
        cos_sin: Cosines, then sines, of the angle of each rotated pair, in float32. A scaled rotation has scaled ones.
        kv_cache: Pages of one layer; ``[:, 0]`` are keys, ``[:, 1]`` values.
        slot_mapping: Slot of each row; rows with a negative slot are not written. May be longer than ``qkv``.
        q_norm: Weight of the root-mean-square norm of each query head; None for no norm.
        k_norm: Weight of that of each key head; None if and only if ``q_norm`` is.
        eps: Added to the mean square.
        traditional: Whether a pair is two neighbours, not elements half the rotated size apart.
        gated: Whether a gate of the same size follows each query head in ``qkv``; it is passed over.

    Returns:
        The queries, rotated, and the cache that holds the rows.

    Raises:
        MetalKernelsError: A shape does not fit the cache.
    """
    _check(qkv, cos_sin, kv_cache, slot_mapping, q_norm, k_norm, gated)
    run = kernels.rope_and_cache if kernels.move_pages(kv_cache) else reference.rope_and_cache
    return run(
        qkv,
        cos_sin.astype(mx.float32),
        kv_cache,
        slot_mapping,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        traditional=traditional,
        gated=gated,
    )


def _check(
    qkv: mx.array,
    cos_sin: mx.array,
    kv_cache: mx.array,
    slot_mapping: mx.array,
    q_norm: mx.array | None,
    k_norm: mx.array | None,
    gated: bool,
) -> None:
    """Refuse what does not fit together."""
    require_kv_cache("rope_and_cache", kv_cache)
    tokens, (kv_heads, head_size) = qkv.shape[0], kv_cache.shape[3:]
    if qkv.shape[1] % head_size or qkv.shape[1] <= 2 * kv_heads * head_size:
        raise MetalKernelsError(
            f"[rope_and_cache] expected rows of query heads and {2 * kv_heads} more heads of {head_size}, got "
            f"{qkv.shape[1]} elements. Join the projections of queries, keys and values."
        )
    if gated and (qkv.shape[1] // head_size) % 2:
        raise MetalKernelsError(
            f"[rope_and_cache] expected a gate for each query head, got rows of {qkv.shape[1] // head_size} heads. "
            "Let the gate follow its query."
        )
    if cos_sin.shape[0] != tokens or cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_size or head_size % 2:
        raise MetalKernelsError(
            f"[rope_and_cache] expected an even number of cosines and sines, at most {head_size}, for each of "
            f"{tokens} rows, got {cos_sin.shape}. Pass one of each per rotated pair."
        )
    if (q_norm is None) != (k_norm is None):
        raise MetalKernelsError(
            "[rope_and_cache] expected norms of both queries and keys, or neither, got one. Pass both."
        )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            require_rows("rope_and_cache", name, weight, (head_size,))
    if slot_mapping.size < tokens:
        raise MetalKernelsError(
            f"[rope_and_cache] expected a slot for each of {tokens} rows, got {slot_mapping.size}. Pad with -1."
        )
