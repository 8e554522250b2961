"""New keys and values, written into the cache in place."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.source import PortableKernel

_THREADS = 256
_KERNEL = PortableKernel(
    "reshape_and_cache",
    ("key_in", "value_in", "kv_cache_in", "slots_in"),
    ("order_out",),
    "reshape_and_cache.metal",
)


def reshape_and_cache(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
    slot_mapping: Int32[mx.array, "tokens"],
) -> tuple[Float[mx.array, "blocks 2 block_size kv_heads head_size"], mx.array]:
    """Write rows at their slots; see :func:`metal_kernels.reshape_and_cache`.

    Returns the same array, changed once the order token is evaluated. ``kv_cache`` owns contiguous memory.
    """
    tokens = slot_mapping.size
    if tokens == 0:
        return kv_cache, slot_mapping
    _, _, block_size, kv_heads, head_size = kv_cache.shape
    (order_token,) = _KERNEL(
        [key.astype(kv_cache.dtype), value.astype(kv_cache.dtype), kv_cache, mx.contiguous(slot_mapping)],
        [((8,), mx.int32)],
        threadgroups=(tokens, -(-kv_heads * head_size // _THREADS)),
        threads=_THREADS,
        template={
            "T": kv_cache.dtype,
            "KV_HEADS": kv_heads,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": block_size,
            "THREADS": _THREADS,
        },
    )
    return kv_cache, order_token
