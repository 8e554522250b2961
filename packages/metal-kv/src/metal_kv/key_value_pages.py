"""Keys and values in pages: the kernels for pages of floating-point numbers and for those of quantised rows."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import (
    RaggedBatch,
    paged_attention,
    quantized_paged_attention,
    quantized_reshape_and_cache,
    reshape_and_cache,
)
from metal_kv.spec import AttentionSpec


def write_rows(
    spec: AttentionSpec,
    key: Float[mx.array, "tokens kv_heads head_size"],
    value: Float[mx.array, "tokens kv_heads head_size"],
    kv_cache: mx.array,
    slot_mapping: Int32[mx.array, "tokens"],
) -> tuple[mx.array, mx.array]:
    """Return the pages with the rows at their slots, and the token that orders reads after the write."""
    if spec.rows:
        return quantized_reshape_and_cache(key, value, kv_cache, slot_mapping, spec.rows)
    return reshape_and_cache(key.astype(spec.dtype), value.astype(spec.dtype), kv_cache, slot_mapping)


def attend_rows(
    spec: AttentionSpec,
    query: Float[mx.array, "tokens q_heads head_size"],
    kv_cache: mx.array,
    batch: RaggedBatch,
    **options: Any,
) -> Float[mx.array, "tokens q_heads head_size"]:
    """Return attention over the pages; ``options`` are those of ``metal_kernels.paged_attention``."""
    if spec.rows:
        return quantized_paged_attention(query, kv_cache, batch, spec.rows, **options)
    return paged_attention(query, kv_cache, batch, **options)
