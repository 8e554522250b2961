"""Keys and values in pages: the kernels for pages of floating-point numbers and for those of quantised rows."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import (
    RaggedBatch,
    gather_kv_cache,
    paged_attention,
    quantized_gather_kv_cache,
    quantized_paged_attention,
    quantized_reshape_and_cache,
    reshape_and_cache,
    target,
)
from metal_kernels.reference.cache import page_rows, write_page_rows
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.spec import AttentionSpec


def write_rows(
    spec: AttentionSpec,
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: mx.array,
    metadata: AttentionMetadata,
) -> tuple[mx.array, mx.array]:
    """Return the pages with the rows at their slots, and the token that orders reads after the write."""
    if spec.rows:
        return quantized_reshape_and_cache(key, value, kv_cache, metadata.slot_mapping, spec.rows)
    key, value = (rows if rows.dtype == spec.dtype else rows.astype(spec.dtype) for rows in (key, value))
    if target() != "cpu":
        return reshape_and_cache(key, value, kv_cache, metadata.slot_mapping)
    block_size = kv_cache.shape[2]
    places = metadata.batch.once(("page rows", block_size), lambda: page_rows(metadata.slots.host, block_size))
    return write_page_rows(key, value, kv_cache, places), metadata.slot_mapping


def attend_rows(
    spec: AttentionSpec,
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: mx.array,
    batch: RaggedBatch,
    *,
    key: mx.array | None = None,
    value: mx.array | None = None,
    **options: Any,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Return attention over the pages; keywords are those of ``metal_kernels.paged_attention``."""
    if spec.rows:
        return quantized_paged_attention(query, kv_cache, batch, spec.rows, **options)
    return paged_attention(query, kv_cache, batch, key=key, value=value, **options)


def gather_rows(
    spec: AttentionSpec, kv_cache: mx.array, block_table: Int32[mx.array, "max_blocks"], seq_len: int
) -> tuple[Float[mx.array, "context kv_heads head_size"], Float[mx.array, "context kv_heads head_size"]]:
    """Return one request's keys and values at positions 0 up to ``seq_len``, as numbers of the spec's dtype."""
    if spec.rows:
        keys, values = quantized_gather_kv_cache(kv_cache, block_table, seq_len, spec.rows)
        return keys.astype(spec.dtype), values.astype(spec.dtype)
    return gather_kv_cache(kv_cache, block_table, seq_len)
