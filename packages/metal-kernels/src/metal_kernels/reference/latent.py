"""Multi-head latent attention over a block table with plain MLX operations."""

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.device import target
from metal_kernels.latent_projections import LatentProjections
from metal_kernels.ragged import RaggedBatch
from metal_kernels.reference.decode import planned_slots
from metal_kernels.reference.fused import rotate
from metal_kernels.reference.plan import plan_attention


def concat_and_cache_mla(
    latent: Float[mx.array, "tokens latent_size"],
    rope: Float[mx.array, "tokens rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    slot_mapping: Int32[mx.array, "tokens"],
) -> tuple[Float[mx.array, "blocks block_size row_size"], mx.array]:
    """Write rows ``[latent | rope]`` at their slots; see :func:`metal_kernels.concat_and_cache_mla`.

    Returns a new array; the order token orders nothing here. ``slot_mapping`` is read back to the host.
    """
    slots = np.asarray(slot_mapping)
    rows = mx.concatenate([latent, rope], axis=-1)
    if slots.size == 0 or slots.min() < 0:
        kept = np.flatnonzero(slots >= 0)
        if kept.size == 0:
            return kv_cache, slot_mapping
        rows, slots = rows[mx.array(kept.astype(np.int32))], slots[kept]
    written = kv_cache.reshape(-1, kv_cache.shape[-1])
    written[mx.array(slots)] = rows
    return written.reshape(kv_cache.shape), slot_mapping


def mla_attention(
    query: Float[mx.array, "tokens q_heads query_size"],
    query_rope: Float[mx.array, "tokens q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    batch: RaggedBatch,
    *,
    scale: float,
    order_token: mx.array | None = None,
    projections: LatentProjections | None = None,
) -> Float[mx.array, "tokens q_heads value_size"]:
    """Attend each row to its own request's latents; see :func:`metal_kernels.mla_attention`.

    The rows of the cache are the one key head of all query heads, and their first part the values: so requests
    are grouped and tiled as ``paged_attention`` does it, by a plan shared by all layers of a step.
    """
    if projections is not None:
        absorbed = projections.absorb(query)
        out = mla_attention(absorbed, query_rope, kv_cache, batch, scale=scale, order_token=order_token)
        return projections.unabsorb(out)
    query_latent = query
    if batch.num_tokens == 0:
        return query_latent
    block_size, row_size = kv_cache.shape[1:]
    latent_size = query_latent.shape[-1]
    plan = batch.once(
        ("reference latent attention", block_size),
        lambda: plan_attention(batch, None, block_size, 1, halves=1),
    )
    cached = kv_cache.reshape(-1, row_size)
    # MLX's matmul on a CPU is fast in float32 only.
    compute = mx.float32 if target() == "cpu" else query_latent.dtype
    query = mx.concatenate([query_latent, query_rope], axis=-1).astype(compute)
    outputs = []
    for group in plan.groups:
        keys = cached[group.key_rows].astype(compute)  # [requests, 1, keys, row_size]
        for tile in group.tiles:
            rows, seen = query[tile.rows], keys[:, :, tile.keys]
            # One row of each request: its heads become rows, so that each key is read once for all of them.
            rows = rows[:, None] if group.single_row else rows.swapaxes(0, 1)[None]
            out = mx.fast.scaled_dot_product_attention(
                rows, seen, seen[..., :latent_size], scale=scale, mask=tile.mask
            )
            outputs.append(out[:, 0] if group.single_row else out[0].swapaxes(0, 1))
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    if plan.restore is not None:
        joined = joined[plan.restore]
    return joined.astype(query_latent.dtype)


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
    heads = query.reshape(tokens, q_heads, -1)
    rope = heads[..., heads.shape[2] - rope_size :]
    rows, key = mx.split(latent, [latent.shape[1] - rope_size], axis=1)
    rows = mx.fast.rms_norm(rows, norm, eps).astype(kv_cache.dtype)
    key = rotate(key[:, None], cos_sin, traditional)[:, 0].astype(kv_cache.dtype)
    written, _ = concat_and_cache_mla(rows, key, kv_cache, slot_mapping[:tokens])
    return rotate(rope, cos_sin, traditional), written


def latent_decode(
    query_latent: Float[mx.array, "tokens q_heads latent_size"],
    query_rope: Float[mx.array, "tokens q_heads rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    plan: DecodePlan,
    *,
    scale: float,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads latent_size"]:
    """Attend planned rows; see :func:`metal_kernels.latent_decode`. Reads the plan back to the host."""
    del order_token
    block_size, row_size = kv_cache.shape[1:]
    cached = kv_cache.reshape(-1, row_size)
    query = mx.concatenate([query_latent, query_rope], axis=-1).astype(mx.float32)
    outputs = []
    for row, slots in planned_slots(plan, block_size):
        if slots.size == 0:
            outputs.append(mx.zeros(query_latent.shape[1:], mx.float32))
            continue
        keys = cached[mx.array(slots)].astype(mx.float32)
        weights = mx.softmax(query[row] @ keys.T * scale, axis=-1)
        outputs.append(weights @ keys[:, : query_latent.shape[2]])
    return mx.stack(outputs).astype(query_latent.dtype)
