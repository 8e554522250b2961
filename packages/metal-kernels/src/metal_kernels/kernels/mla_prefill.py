"""Latent attention of requests with several rows, over keys and values made from their latents once."""

from functools import partial

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.kernels.blocks import gather_blocks
from metal_kernels.kernels.dispatch import ExpandedPrefill, PrefillVariant
from metal_kernels.kernels.own_pages import own_pages
from metal_kernels.kernels.prefill_tiled import prefill_tiled
from metal_kernels.latent_projections import LatentProjections
from metal_kernels.ragged import RaggedBatch

_MAX_KEPT = 2**26  # elements of masks that all layers of a step share


def mla_prefill(
    query: Float[mx.array, "rows q_heads head_size"],
    query_rope: Float[mx.array, "rows q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    batch: RaggedBatch,
    projections: LatentProjections,
    route: ExpandedPrefill,
    *,
    scale: float,
    order_token: mx.array | None = None,
) -> Float[mx.array, "rows q_heads value_size"]:
    """Attend each row to its own request's keys; see :func:`metal_kernels.mla_attention`.

    Args:
        query: Rows of ``batch``, not absorbed.
        query_rope: Their rotary parts.
        kv_cache: Pages of one layer, written in place before ``order_token``.
        batch: Requests that have rows.
        projections: Of the layer.
        route: From :func:`metal_kernels.kernels.expanded_prefill`.
        scale: Factor on the scores.
        order_token: Of the last write.
    """
    if route.tiled is not None:
        return _tiled(query, query_rope, kv_cache, batch, projections, route.tiled, scale, order_token)
    outputs = []
    starts, ends = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    blocks, block_size, row_size = kv_cache.shape
    table, width = batch.on_device("block_table"), batch.block_table.shape[1]
    halves = kv_cache.reshape(blocks, 2, 1, 1, block_size * row_size // 2)
    for request, end in enumerate(ends):
        rows = slice(starts[request], starts[request + 1])
        ids = table[request * width : request * width - (-end // block_size)]
        cached = gather_blocks(halves, ids, order_token).reshape(-1, row_size)[:end]
        sizes = (rows.stop - rows.start, end, route.rows, query.dtype)
        kept = sizes[0] * end <= _MAX_KEPT
        masks = batch.once(("causal", sizes), partial(_causal, *sizes)) if kept else _causal(*sizes)
        outputs.append(_biased(query[rows], query_rope[rows], cached, projections, masks, scale))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _biased(
    query: Float[mx.array, "rows q_heads head_size"],
    query_rope: Float[mx.array, "rows q_heads rope_size"],
    cached: Float[mx.array, "keys row_size"],
    projections: LatentProjections,
    masks: list[mx.array],
    scale: float,
) -> Float[mx.array, "rows q_heads value_size"]:
    """Attend one request: rotary scores are what MLX's fused attention adds to those of the other elements."""
    rope_size = query_rope.shape[2]
    latent, rope = mx.split(cached, [cached.shape[1] - rope_size], axis=1)
    keys, values = (half[None] for half in projections.expand(latent))
    query, query_rope = (rows.swapaxes(0, 1)[None] for rows in (query, query_rope * scale))
    rope = rope.T[None, None]
    outputs, start = [], 0
    for mask in masks:
        stop, seen = start + mask.shape[0], mask.shape[1]
        bias = mx.addmm(mask, query_rope[:, :, start:stop], rope[..., :seen])
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                query[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], scale=scale, mask=bias
            )
        )
        start = stop
    out = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
    return out.squeeze(0).swapaxes(0, 1)


def _causal(num_rows: int, num_keys: int, rows_at_once: int, dtype: mx.Dtype) -> list[mx.array]:
    """Return what hides later keys from some rows at a time: 0, or a number far below all scores."""
    positions = mx.arange(num_keys)
    seen, hidden = mx.array(0, dtype), mx.array(mx.finfo(dtype).min / 2, dtype)
    masks = []
    for start in range(num_keys - num_rows, num_keys, rows_at_once):
        stop = min(num_keys, start + rows_at_once)
        masks.append(mx.where(positions[start:stop, None] >= positions[None, :stop], seen, hidden))
    return masks


def _tiled(
    query: Float[mx.array, "rows q_heads head_size"],
    query_rope: Float[mx.array, "rows q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    batch: RaggedBatch,
    projections: LatentProjections,
    variant: PrefillVariant,
    scale: float,
    order_token: mx.array | None,
) -> Float[mx.array, "rows q_heads value_size"]:
    """Attend all requests at once, over pages of expanded keys and values."""
    pages, own = own_pages(kv_cache, batch, order_token)
    _, block_size, row_size = pages.shape
    rope_size, q_heads = query_rope.shape[2], query.shape[1]
    latent, rope = mx.split(pages.reshape(-1, row_size), [row_size - rope_size], axis=1)
    keys, values = (half.swapaxes(0, 1) for half in projections.expand(latent))
    num_keys, head_size, value_size = len(rope), query.shape[2] + rope_size, values.shape[2]
    keys = mx.concatenate([keys, mx.broadcast_to(rope[:, None], (num_keys, q_heads, rope_size))], axis=2)
    values = mx.pad(values, [(0, 0), (0, 0), (0, head_size - value_size)])
    shape = (-1, 1, block_size, q_heads, head_size)
    expanded = mx.concatenate([keys.reshape(shape), values.reshape(shape)], axis=1)
    rows = mx.concatenate([query, query_rope], axis=2)
    return prefill_tiled(rows, expanded, own, variant, scale=scale)[..., :value_size]
