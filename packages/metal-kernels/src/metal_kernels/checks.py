"""Refusals that the public functions share."""

import mlx.core as mx

from metal_kernels.errors import MetalKernelsError
from metal_kernels.ragged import RaggedBatch


def require_kv_cache(operation: str, kv_cache: mx.array) -> None:
    """Refuse an array that is not a page array of keys and values."""
    if kv_cache.ndim != 5 or kv_cache.shape[1] != 2:
        raise MetalKernelsError(
            f"[{operation}] expected kv_cache of shape [blocks, 2, block_size, kv_heads, head_size], got "
            f"{kv_cache.shape}. Allocate keys and values of a layer as one array."
        )


def require_rows(operation: str, name: str, rows: mx.array, shape: tuple[int, ...]) -> None:
    """Refuse rows that do not fit the cache or the batch."""
    if rows.shape != shape:
        raise MetalKernelsError(
            f"[{operation}] expected {name} of shape {shape}, got {rows.shape}. "
            "Pass the rows of this step, in the cache's number of heads and head size."
        )


def require_latent_cache(operation: str, kv_cache: mx.array) -> None:
    """Refuse an array that is not a page array of latent rows."""
    if kv_cache.ndim != 3 or kv_cache.shape[2] % 2:
        raise MetalKernelsError(
            f"[{operation}] expected kv_cache of shape [blocks, block_size, row_size] with an even row_size, got "
            f"{kv_cache.shape}. Allocate latent and rotary part of a layer as one row per token."
        )


def require_blocks(operation: str, batch: RaggedBatch, block_size: int) -> None:
    """Refuse a block table that does not reach the end of a context."""
    if batch.max_seq_len > batch.block_table.shape[1] * block_size:
        raise MetalKernelsError(
            f"[{operation}] expected blocks for {batch.max_seq_len} tokens, got a block table of "
            f"{batch.block_table.shape[1]} blocks of {block_size}. Allocate blocks before building the batch."
        )
