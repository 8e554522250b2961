"""Attention of a ragged batch over paged keys and values."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels import reference
from metal_kernels.errors import MetalKernelsError
from metal_kernels.ragged import RaggedBatch


def paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    batch: RaggedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Return attention of every row over the cached context of its request, itself included.

    A row at position ``p`` sees the keys ``max(0, p - sliding_window + 1) .. p`` of its request. Query heads are
    grouped: head ``h`` reads key head ``h // (q_heads / kv_heads)``. The softmax is computed in float32. Lazy.

    Args:
        query: Rows in the order of ``batch``.
        kv_cache: Pages of one layer; ``[:, 0]`` holds keys, ``[:, 1]`` values.
        batch: Which rows and which pages belong together.
        scale: Factor of the scores.
        sliding_window: Positions a row sees, its own included; None for all before it.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)`` (Gemma 2, arXiv:2408.00118).
        sinks: One more logit per head that joins the softmax and has no value (arXiv:2309.17453).
        order_token: What the write before this read returned; the read happens after it.

    Raises:
        MetalKernelsError: Heads, head sizes or rows do not fit together.
    """
    _check(query, kv_cache, batch, sinks)
    return reference.paged_attention(
        query,
        kv_cache,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        order_token=order_token,
    )


def _check(query: mx.array, kv_cache: mx.array, batch: RaggedBatch, sinks: mx.array | None) -> None:
    tokens, q_heads, head_size = query.shape
    kv_heads = kv_cache.shape[3]
    if tokens != batch.num_tokens:
        raise MetalKernelsError(
            f"[paged_attention] expected {batch.num_tokens} query rows, got {tokens}. Build the batch for this step."
        )
    if q_heads % kv_heads or head_size != kv_cache.shape[4]:
        raise MetalKernelsError(
            f"[paged_attention] expected query heads in groups over {kv_heads} key heads of size {kv_cache.shape[4]}, "
            f"got {q_heads} heads of size {head_size}. Reshape the query, or use the layer's own cache."
        )
    if sinks is not None and sinks.shape != (q_heads,):
        raise MetalKernelsError(
            f"[paged_attention] expected {q_heads} sinks, got shape {sinks.shape}. Pass one per head."
        )
