"""What happens to the rows of a step between its matmuls, with plain MLX operations."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.reference.cache import reshape_and_cache


def add_rms_norm(
    rows: Float[mx.array, "tokens *addends hidden"],
    residual: Float[mx.array, "tokens hidden"],
    weight: Float[mx.array, "hidden"],
    eps: float,
    beside: Float[mx.array, "tokens hidden"] | None = None,
) -> tuple[Float[mx.array, "tokens hidden"], Float[mx.array, "tokens hidden"]]:
    """Add and normalise rows; see :func:`metal_kernels.add_rms_norm`."""
    if rows.ndim == 3:
        rows = rows.astype(mx.float32).sum(axis=1)
    if beside is not None:
        rows = rows.astype(mx.float32) + beside
    added = (rows + residual).astype(residual.dtype)
    return mx.fast.rms_norm(added, weight, eps), added


def silu_and_mul(gate_up: Float[mx.array, "tokens twice_width"]) -> Float[mx.array, "tokens width"]:
    """Gate rows; see :func:`metal_kernels.silu_and_mul`."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


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
    kv_heads, head_size = kv_cache.shape[3:]
    tokens = qkv.shape[0]
    rows = qkv.reshape(tokens, -1, head_size)
    query, key, value = mx.split(rows, [rows.shape[1] - 2 * kv_heads, rows.shape[1] - kv_heads], axis=1)
    if gated:
        query = query[:, ::2]
    if q_norm is not None and k_norm is not None:
        query, key = mx.fast.rms_norm(query, q_norm, eps), mx.fast.rms_norm(key, k_norm, eps)
    query, key = (rotate(heads, cos_sin, traditional) for heads in (query, key))
    written, _ = reshape_and_cache(
        key.astype(kv_cache.dtype), value.astype(kv_cache.dtype), kv_cache, slot_mapping[:tokens]
    )
    return query, written


def rotate(heads: mx.array, cos_sin: mx.array, traditional: bool) -> mx.array:
    """Rotate pairs of the first elements of ``[tokens, heads, head_size]``, in float32."""
    size = cos_sin.shape[1]
    cosine, sine = mx.split(cos_sin[:, None], 2, axis=-1)
    turned = heads[..., :size].astype(mx.float32)
    if traditional:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = mx.split(turned, 2, axis=-1)
    pair = [first * cosine - second * sine, first * sine + second * cosine]
    joined = mx.stack(pair, axis=-1).reshape(turned.shape) if traditional else mx.concatenate(pair, axis=-1)
    return mx.concatenate([joined.astype(heads.dtype), heads[..., size:]], axis=-1)
