"""Attention over, and writes to, a cache whose rows are quantised."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from jaxtyping import Float, Int32, UInt32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_blocks, require_rows
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError
from metal_kernels.ragged import RaggedBatch
from metal_kernels.row_format import RowFormat


def quantized_reshape_and_cache(
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    slot_mapping: Int32[mx.array, "tokens"],
    row_format: RowFormat,
) -> tuple[UInt32[mx.array, "blocks block_size row_words"], mx.array]:
    """Quantise each token's key and value into the row at its slot.

    What :func:`metal_kernels.reshape_and_cache` says of arrays and order holds here too.

    Args:
        key: New keys, in any float dtype.
        value: New values.
        kv_cache: Pages of one layer.
        slot_mapping: ``block * block_size + offset`` of each token. Rows with a negative slot are skipped.
            Slots of one call differ from each other.
        row_format: How a row is laid out.

    Returns:
        The cache that holds the rows, and an order token: pass it to whatever reads them.

    Raises:
        MetalKernelsError: A shape does not fit the format.
    """
    _require_pages("quantized_reshape_and_cache", kv_cache, row_format)
    rows = (slot_mapping.size, row_format.num_kv_heads, row_format.head_size)
    require_rows("quantized_reshape_and_cache", "key", key, rows)
    require_rows("quantized_reshape_and_cache", "value", value, rows)
    write: Callable[..., tuple[mx.array, mx.array]] = reference.quantized_reshape_and_cache
    if _writes_in_place(kv_cache, row_format):
        write = kernels.quantized_reshape_and_cache
    return write(key, value, kv_cache, slot_mapping, row_format)


def quantized_paged_attention(
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    batch: RaggedBatch,
    row_format: RowFormat,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[mx.array, "q_heads"] | None = None,
    order_token: mx.array | None = None,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Attend each row to the dequantised keys of its own request, up to and including its own position.

    The arguments are those of :func:`metal_kernels.paged_attention`, and ``row_format``, which says how a row of the
    cache is laid out.

    Raises:
        MetalKernelsError: Shapes, the batch and the cache do not fit together.
    """
    _require_pages("quantized_paged_attention", kv_cache, row_format)
    q_heads = query.shape[1]
    require_rows("quantized_paged_attention", "query", query, (batch.num_tokens, q_heads, row_format.head_size))
    if q_heads % row_format.num_kv_heads:
        raise MetalKernelsError(
            f"[quantized_paged_attention] expected a multiple of {row_format.num_kv_heads} query heads, got "
            f"{q_heads}. Each key head serves the same number of query heads."
        )
    require_blocks("quantized_paged_attention", batch, kv_cache.shape[1])
    if sinks is not None and sinks.shape != (q_heads,):
        raise MetalKernelsError(
            f"[quantized_paged_attention] expected {q_heads} sinks, got shape {sinks.shape}. Pass one per query head."
        )
    if sliding_window is not None and sliding_window < 1:
        raise MetalKernelsError(
            f"[quantized_paged_attention] expected a sliding window of at least 1, got {sliding_window}. "
            "Pass None for full attention."
        )
    attend: Callable[..., mx.array] = reference.quantized_paged_attention
    if _writes_in_place(kv_cache, row_format):
        group = q_heads // row_format.num_kv_heads
        attend = partial(
            kernels.quantized_paged_attention,
            decode=kernels.quantized_decode_kernel(target(), query.dtype, row_format, group),
        )
    return attend(
        query,
        kv_cache,
        batch,
        row_format,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        order_token=order_token,
    )


def quantized_gather_kv_cache(
    kv_cache: UInt32[mx.array, "blocks block_size row_words"],
    block_table: Int32[mx.array, "max_blocks"],
    seq_len: int,
    row_format: RowFormat,
) -> tuple[Float[mx.array, "context kv_heads head_size"], Float[mx.array, "context kv_heads head_size"]]:
    """Return the dequantised keys and values, in float32, at positions 0 up to ``seq_len`` of one request.

    Args:
        kv_cache: Pages of one layer.
        block_table: The request's blocks in order, padded on the right.
        seq_len: Number of positions to read.
        row_format: How a row is laid out.

    Raises:
        MetalKernelsError: The table is too short for ``seq_len``.
    """
    _require_pages("quantized_gather_kv_cache", kv_cache, row_format)
    capacity = block_table.size * kv_cache.shape[1]
    if not 0 <= seq_len <= capacity:
        raise MetalKernelsError(
            f"[quantized_gather_kv_cache] expected seq_len of 0 to {capacity}, the tokens of {block_table.size} "
            f"blocks, got {seq_len}. Pass the request's whole block table row."
        )
    return reference.quantized_gather_kv_cache(kv_cache, block_table, seq_len, row_format)


def _writes_in_place(kv_cache: mx.array, row_format: RowFormat) -> bool:
    """Whether rows are written in place, so that only kernels may read them."""
    answer = kernels.quantized_write_kernel(target(), row_format, kv_cache.size)
    return isinstance(answer, kernels.Accepted) and kernels.writes_in_place()


def _require_pages(operation: str, kv_cache: mx.array, row_format: RowFormat) -> None:
    if kv_cache.ndim != 3 or kv_cache.shape[2] != row_format.row_words or kv_cache.dtype != mx.uint32:
        raise MetalKernelsError(
            f"[{operation}] expected kv_cache to be uint32 of shape [blocks, block_size, {row_format.row_words}], got "
            f"{kv_cache.dtype} of shape {kv_cache.shape}. Allocate pages of whole rows."
        )
