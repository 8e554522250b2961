"""Attention of a ragged batch over a block table."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from jaxtyping import Float

from metal_kernels import kernels, reference
from metal_kernels.checks import require_blocks, require_kv_cache, require_rows
from metal_kernels.device import target
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
    key: Float[mx.array, "tokens kv_heads head_size"] | None = None,
    value: Float[mx.array, "tokens kv_heads head_size"] | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend each row to the keys of its own request, up to and including its own position.

    The row at position ``p`` sees keys ``max(0, p - sliding_window + 1)`` to ``p``; its own key is already in
    the cache. Query head ``h`` uses key head ``h // (q_heads // kv_heads)``. The softmax is in float32.

    Args:
        query: Rows of the step, in the batch's order.
        kv_cache: Pages of one layer.
        batch: Which rows belong to which request, and the blocks of each.
        scale: Factor on the scores, usually ``head_size ** -0.5``.
        sliding_window: Keys a row sees at most, its own included; None for all.
        soft_cap: Scores ``s`` become ``soft_cap * tanh(s / soft_cap)`` (Gemma 2, arXiv:2408.00118).
        sinks: One more logit per query head that joins the softmax and has no value (arXiv:2309.17453).
        order_token: What the write of this step's keys returned.
        key: The step's own keys, as they were written. They are in the cache too; attention of requests that have no
            others may read them here, where they lie together.
        value: Its values, likewise.

    Raises:
        MetalKernelsError: Shapes, the batch and the cache do not fit together.
    """
    _check(query, kv_cache, batch, sliding_window, sinks, key, value)
    attend: Callable[..., mx.array] = reference.paged_attention
    if kernels.move_pages(kv_cache):
        _, _, block_size, kv_heads, head_size = kv_cache.shape
        group = query.shape[1] // kv_heads
        decode = kernels.decode_kernel(target(), query.dtype, kv_cache.dtype, head_size, block_size, group)
        attend = partial(kernels.paged_attention, decode=decode)
    return attend(
        query,
        kv_cache,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        order_token=order_token,
        key=key,
        value=value,
    )


def _check(
    query: mx.array,
    kv_cache: mx.array,
    batch: RaggedBatch,
    sliding_window: int | None,
    sinks: mx.array | None,
    key: mx.array | None,
    value: mx.array | None,
) -> None:
    """Refuse what does not fit together."""
    require_kv_cache("paged_attention", kv_cache)
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    q_heads = query.shape[1]
    require_rows("paged_attention", "query", query, (batch.num_tokens, q_heads, head_size))
    for name, rows in (("key", key), ("value", value)):
        if rows is not None:
            require_rows("paged_attention", name, rows, (batch.num_tokens, kv_heads, head_size))
    if q_heads % kv_heads:
        raise MetalKernelsError(
            f"[paged_attention] expected a multiple of {kv_heads} query heads, got {q_heads}. "
            "Each key head serves the same number of query heads."
        )
    require_blocks("paged_attention", batch, block_size)
    if sinks is not None and sinks.shape != (q_heads,):
        raise MetalKernelsError(
            f"[paged_attention] expected {q_heads} sinks, got shape {sinks.shape}. Pass one per query head."
        )
    if sliding_window is not None and sliding_window < 1:
        raise MetalKernelsError(
            f"[paged_attention] expected a sliding window of at least 1, got {sliding_window}. "
            "Pass None for full attention."
        )
