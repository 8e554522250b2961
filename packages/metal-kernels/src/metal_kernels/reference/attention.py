"""Attention over a block table with plain MLX operations."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Bool, Float

from metal_kernels.device import target
from metal_kernels.ragged import RaggedBatch
from metal_kernels.reference.plan import AttentionPlan, KeyGroup, Mask, RowTile, plan_attention


class Options(NamedTuple):
    """What scores go through; see ``metal_kernels.paged_attention``."""

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
    key: Float[mx.array, "tokens kv_heads head_size"] | None = None,
    value: Float[mx.array, "tokens kv_heads head_size"] | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend each row to its own request's keys; see :func:`metal_kernels.paged_attention`.

    Requests with one row are padded to a common context in groups of similar length; the others are done
    one by one in tiles of rows. Which rows and keys those are is planned once for all layers of a step.
    """
    del key, value  # the cache has them
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
    convert = kv_cache.dtype != compute

    def fetch(group: KeyGroup) -> tuple[mx.array, mx.array]:
        keys, values = head_rows[group.key_rows], head_rows[group.value_rows]
        return (keys.astype(compute), values.astype(compute)) if convert else (keys, values)

    return attend_groups(query, plan, fetch, compute, Options(scale, soft_cap, sinks))


def attend_dense(
    query: Float[mx.array, "reqs q_heads head_size"],
    keys: Float[mx.array, "reqs kv_heads columns head_size"],
    values: Float[mx.array, "reqs kv_heads columns head_size"],
    mask: Bool[mx.array, "reqs 1 1 columns"] | None,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
) -> Float[mx.array, "reqs q_heads head_size"]:
    """Attend one row of each request to keys that lie together; otherwise as :func:`metal_kernels.paged_attention`.

    Args:
        query: A row for each request.
        keys: Of each request, in the type to compute in.
        values: Likewise.
        mask: Which keys a request has; None for all.
        scale: See ``metal_kernels.paged_attention``.
        soft_cap: Likewise.
        sinks: Likewise.
    """
    options = Options(scale, soft_cap, None if sinks is None else sinks.astype(keys.dtype))
    rows = query if query.dtype == keys.dtype else query.astype(keys.dtype)
    (out,) = _attend_single_rows(rows, keys, values, (RowTile(slice(None), slice(None), mask),), options)
    return out if out.dtype == query.dtype else out.astype(query.dtype)


def attend_groups(
    query: Float[mx.array, "tokens q_heads head_size"],
    plan: AttentionPlan,
    fetch: Callable[[KeyGroup], tuple[mx.array, mx.array]],
    compute: mx.Dtype,
    options: Options,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend as planned.

    Args:
        query: Rows of the step.
        plan: Of the step.
        fetch: Returns the keys and values [requests, kv_heads, keys, head_size] of a group, in ``compute``.
        compute: Type to compute in.
        options: What scores go through.
    """
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks.astype(compute))
    rows = query if query.dtype == compute else query.astype(compute)
    outputs = []
    for group in plan.groups:
        attend = _attend_single_rows if group.single_row else _attend_request
        outputs += attend(rows, *fetch(group), group.tiles, options)
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    if plan.restore is not None:
        joined = joined[plan.restore]
    return joined if joined.dtype == query.dtype else joined.astype(query.dtype)


def _attend_single_rows(
    query: mx.array, keys: mx.array, values: mx.array, tiles: tuple[RowTile, ...], options: Options
) -> list[mx.array]:
    """Return the outputs [reqs, q_heads, head_size] of requests that have one row each."""
    (tile,) = tiles
    reqs, kv_heads, _, head_size = keys.shape
    if options.soft_cap is None and options.sinks is None:
        # The query heads that share a key head become its rows: each key is read once for all of them.
        rows = query[tile.rows].reshape(reqs, kv_heads, -1, head_size)
        out = mx.fast.scaled_dot_product_attention(rows, keys, values, scale=options.scale, mask=tile.mask)
    else:
        out = _attend(query[tile.rows][:, :, None], keys, values, tile.mask, options)
    return [out.reshape(reqs, -1, head_size)]


def _attend_request(
    query: mx.array, keys: mx.array, values: mx.array, tiles: tuple[RowTile, ...], options: Options
) -> list[mx.array]:
    """Return the outputs [rows, q_heads, head_size] of the tiles of one request."""
    outputs = []
    for tile in tiles:
        rows = query[tile.rows].swapaxes(0, 1)[None]
        out = _attend(rows, keys[:, :, tile.keys], values[:, :, tile.keys], tile.mask, options)
        outputs.append(out[0].swapaxes(0, 1))
    return outputs


def _attend(query: mx.array, keys: mx.array, values: mx.array, mask: Mask, options: Options) -> mx.array:
    """Attend [reqs, q_heads, rows, head_size] to [reqs, kv_heads, keys, head_size]."""
    if options.soft_cap is None:
        return mx.fast.scaled_dot_product_attention(
            query, keys, values, scale=options.scale, mask=mask, sinks=options.sinks
        )
    reqs, q_heads, rows, head_size = query.shape
    kv_heads, num_keys = keys.shape[1:3]
    grouped = (query * options.scale).reshape(reqs, kv_heads, -1, head_size)
    scores = (grouped @ keys.swapaxes(-1, -2)).astype(mx.float32).reshape(reqs, q_heads, rows, num_keys)
    scores = mx.tanh(scores / options.soft_cap) * options.soft_cap
    if mask is not None:
        scores = mx.where(_as_array(mask, rows, num_keys), scores, -mx.inf)
    if options.sinks is not None:
        sinks = mx.broadcast_to(options.sinks.astype(mx.float32)[:, None, None], (reqs, q_heads, rows, 1))
        weights = mx.softmax(mx.concatenate([sinks, scores], axis=-1), axis=-1)[..., 1:]
    else:
        weights = mx.softmax(scores, axis=-1)
    weights = weights.astype(values.dtype).reshape(reqs, kv_heads, -1, num_keys)
    return (weights @ values).reshape(reqs, q_heads, rows, head_size)


def _as_array(mask: mx.array | str, rows: int, keys: int) -> mx.array:
    """Return ``mask`` as booleans; "causal" lets the last row see every key."""
    if isinstance(mask, mx.array):
        return mask
    return mx.arange(keys) <= mx.arange(keys - rows, keys)[:, None]
