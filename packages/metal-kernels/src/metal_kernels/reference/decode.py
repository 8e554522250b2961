"""Attention of planned decode rows with plain MLX operations."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels.decode_plan import DecodePlan


def decode_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    plan: DecodePlan,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend one row of each request; see :func:`metal_kernels.decode_attention`.

    Reads the plan back to the host and takes the requests one by one.
    """
    outputs = []
    for row, slots in planned_slots(plan, kv_cache.shape[2]):
        if slots.size:
            outputs.append(_attend(query[row], kv_cache, slots, scale, soft_cap, sinks))
        else:
            outputs.append(mx.zeros(query.shape[1:], query.dtype))
    return mx.stack(outputs)


def planned_slots(plan: DecodePlan, block_size: int) -> Iterator[tuple[int, Int32[np.ndarray, "keys"]]]:
    """Yield each request's row of the query, 0 if it sees no keys, and the slots of the keys that it sees."""
    table, work = np.asarray(plan.block_table), np.asarray(plan.work).reshape(-1, 4)
    ranges = np.asarray(plan.ranges)[: 2 * plan.num_reqs].reshape(-1, 2)
    for first, count in ranges.tolist():
        parts = work[first : first + count].tolist()
        slots = [_slots(table[start:], begin, end, block_size) for _, start, begin, end in parts]
        yield parts[0][0] if parts else 0, np.concatenate([np.zeros(0, np.int32), *slots]).astype(np.int32)


def _slots(table: np.ndarray, begin: int, end: int, block_size: int) -> np.ndarray:
    position = np.arange(begin, end)
    slots: np.ndarray = table[position // block_size] * block_size + position % block_size
    return slots


def _attend(
    query: mx.array,
    kv_cache: mx.array,
    slots: np.ndarray,
    scale: float,
    soft_cap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attend ``[q_heads, head_size]`` to the rows at ``slots``, in float32."""
    block_size, kv_heads, head_size = kv_cache.shape[2:]
    blocks, offsets = (mx.array(part) for part in np.divmod(slots, block_size))
    keys, values = (kv_cache[blocks, half, offsets].astype(mx.float32).swapaxes(0, 1) for half in (0, 1))
    rows = query.astype(mx.float32).reshape(kv_heads, -1, head_size)
    scores = rows @ keys.swapaxes(1, 2) * scale
    if soft_cap is not None:
        scores = mx.tanh(scores / soft_cap) * soft_cap
    if sinks is not None:
        extra = sinks.astype(mx.float32).reshape(kv_heads, -1, 1)
        weights = mx.softmax(mx.concatenate([scores, extra], axis=-1), axis=-1)[..., :-1]
    else:
        weights = mx.softmax(scores, axis=-1)
    return (weights @ values).reshape(query.shape).astype(query.dtype)
