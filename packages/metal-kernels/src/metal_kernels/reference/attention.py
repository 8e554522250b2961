"""Attention over a block table with plain MLX operations."""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.device import target
from metal_kernels.ragged import RaggedBatch
from metal_kernels.reference.plan import KeyGroup, Mask, plan_attention


class _Options(NamedTuple):
    scale: float
    soft_cap: float | None
    sinks: mx.array | None


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
    """Attend each row to its own request's keys; see :func:`metal_kernels.paged_attention`.

    Requests with one row are padded to a common context in groups of similar length; the others are done
    one by one in tiles of rows. Which rows and keys those are is planned once for all layers of a step.
    """
    if batch.num_tokens == 0:
        return query
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    plan = batch.once(
        ("reference attention", sliding_window, block_size, kv_heads),
        lambda: plan_attention(batch, sliding_window, block_size, kv_heads),
    )
    head_rows = kv_cache.reshape(-1, head_size)
    # MLX's matmul on a CPU is fast in float32 only.
    compute = mx.float32 if target() == "cpu" else query.dtype
    options = _Options(scale, soft_cap, None if sinks is None else sinks.astype(compute))
    rows = query.astype(compute)
    outputs = []
    for group in plan.groups:
        keys = head_rows[group.key_rows].astype(compute)
        values = head_rows[group.value_rows].astype(compute)
        outputs += _attend_group(rows, keys, values, group, options)
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    if plan.restore is not None:
        joined = joined[plan.restore]
    return joined.astype(query.dtype)


def _attend_group(
    query: mx.array, keys: mx.array, values: mx.array, group: KeyGroup, options: _Options
) -> list[mx.array]:
    """Return the outputs of the group's tiles, each [rows, q_heads, head_size]."""
    _, q_heads, head_size = query.shape
    outputs = []
    for tile in group.tiles:
        rows = query[tile.rows]
        if group.single_row:
            out = _attend(rows[:, :, None], keys, values, tile.mask, options)
            outputs.append(out.reshape(-1, q_heads, head_size))
        else:
            tile_keys, tile_values = keys[:, :, tile.keys], values[:, :, tile.keys]
            out = _attend(rows.swapaxes(0, 1)[None], tile_keys, tile_values, tile.mask, options)
            outputs.append(out[0].swapaxes(0, 1))
    return outputs


def _attend(query: mx.array, keys: mx.array, values: mx.array, mask: Mask, options: _Options) -> mx.array:
    """Attend [reqs, q_heads, rows, head_size] to [reqs, kv_heads, keys, head_size]."""
    reqs, q_heads, rows, head_size = query.shape
    kv_heads = keys.shape[1]
    if rows > 1 and options.soft_cap is None:
        return mx.fast.scaled_dot_product_attention(
            query, keys, values, scale=options.scale, mask=mask, sinks=options.sinks
        )
    # The query heads that share a key head become its rows: each key is read once for all of them.
    grouped = (query * options.scale).reshape(reqs, kv_heads, -1, head_size)
    scores = (grouped @ keys.swapaxes(-1, -2)).astype(mx.float32)
    if options.soft_cap is not None:
        scores = mx.tanh(scores / options.soft_cap) * options.soft_cap
    scores = scores.reshape(reqs, q_heads, rows, -1)
    if mask is not None:
        scores = mx.where(_as_array(mask, rows, keys.shape[2]), scores, -mx.inf)
    if options.sinks is not None:
        sinks = mx.broadcast_to(options.sinks.astype(mx.float32)[:, None, None], (reqs, q_heads, rows, 1))
        scores = mx.concatenate([sinks, scores], axis=-1)
    weights = mx.softmax(scores, axis=-1)
    if options.sinks is not None:
        weights = weights[..., 1:]
    weights = weights.astype(values.dtype).reshape(reqs, kv_heads, -1, keys.shape[2])
    return (weights @ values).reshape(reqs, q_heads, rows, head_size)


def _as_array(mask: mx.array | str, rows: int, keys: int) -> mx.array:
    """Return ``mask`` as booleans; "causal" lets the last row see every key."""
    if isinstance(mask, mx.array):
        return mask
    return mx.arange(keys) <= mx.arange(keys - rows, keys)[:, None]
