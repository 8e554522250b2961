"""Whether writes into an input array are seen in order by the kernels that follow."""

import warnings
from functools import cache

import mlx.core as mx

from metal_kernels.device import target
from metal_kernels.kernels.blocks import gather_blocks
from metal_kernels.kernels.cache_write import reshape_and_cache
from metal_kernels.kernels.dispatch import Accepted, page_kernels

_ROUNDS = 8


def move_pages(kv_cache: mx.array) -> bool:
    """Whether kernels read and write the pages of ``kv_cache``, on the default device."""
    return isinstance(page_kernels(target(), kv_cache.dtype, kv_cache.size), Accepted) and writes_in_place()


def writes_in_place() -> bool:
    """Whether the default device may write caches in place; tried once per device.

    Where it may not, a warning says so and writes are functional.
    """
    return _tried(str(mx.default_device()))


@cache
def _tried(device: str) -> bool:
    try:
        passed = _writes_are_seen_in_order()
    except RuntimeError as error:
        why = str(error)
    else:
        why = "a kernel read pages before an earlier kernel had written them"
        if passed:
            return True
    warnings.warn(
        f"[metal_kernels] cache writes in place do not work on {device} ({why}); "
        "writes copy through MLX instead, which is slower.",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def _writes_are_seen_in_order() -> bool:
    """Overwrite the same rows again and again in one graph, reading them after each write."""
    kv_cache = mx.contiguous(mx.zeros((9, 2, 8, 2, 64), mx.float32))
    slots, blocks = mx.arange(8, 72, dtype=mx.int32), mx.arange(1, 9, dtype=mx.int32)
    rows = mx.ones((64, 2, 64))
    mx.eval(kv_cache, slots, blocks, rows)
    seen = []
    for _ in range(_ROUNDS):
        kv_cache, order_token = reshape_and_cache(rows, 2 * rows, kv_cache, slots)
        pages = gather_blocks(kv_cache, blocks, order_token)
        seen.append(pages)
        rows = pages[:, 0].reshape(rows.shape) + 1  # the next write follows this read
    found = mx.stack([mx.stack([p[:, 0].min(), p[:, 0].max(), p[:, 1].min(), p[:, 1].max()]) for p in seen])
    number = mx.arange(1, _ROUNDS + 1, dtype=mx.float32)
    return bool(mx.array_equal(found, mx.stack([number, number, 2 * number, 2 * number], axis=1)).item())
