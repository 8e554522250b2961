"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over a block table."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_blocks, require_latent_cache, require_rows
from metal_kernels.device import target
from metal_kernels.latent_projections import LatentProjections
from metal_kernels.ragged import RaggedBatch


def concat_and_cache_mla(
    latent: Float[mx.array, "tokens latent_size"],
    rope: Float[mx.array, "tokens rope_size"],
    kv_cache: Float[mx.array, "blocks block_size row_size"],
    slot_mapping: Int32[mx.array, "tokens"],
) -> tuple[Float[mx.array, "blocks block_size row_size"], mx.array]:
    """Write each token's latent and rotary key, one after the other, as the row at its slot.

    On a GPU the rows are written into ``kv_cache`` itself; what :func:`metal_kernels.reshape_and_cache` says of
    arrays and order holds here too.

    Args:
        latent: Compressed keys and values, in any float dtype; stored in the cache's.
        rope: Rotary parts of the keys, shared by all heads.
        kv_cache: Pages of one layer; a row is ``latent_size + rope_size`` wide, an even number.
        slot_mapping: ``block * block_size + offset`` of each token. Rows with a negative slot are skipped.

    Returns:
        The cache that holds the rows, and an order token: pass it to whatever reads them.

    Raises:
        MetalKernelsError: A shape does not fit the cache.
    """
    require_latent_cache("concat_and_cache_mla", kv_cache)
    blocks, block_size, row_size = kv_cache.shape
    latent_size = latent.shape[-1]
    require_rows("concat_and_cache_mla", "latent", latent, (slot_mapping.size, latent_size))
    require_rows("concat_and_cache_mla", "rope", rope, (slot_mapping.size, row_size - latent_size))
    if not kernels.move_pages(kv_cache):
        return reference.concat_and_cache_mla(latent, rope, kv_cache, slot_mapping)
    # A row is a page of one token whose halves the kernel takes for a key and a value.
    rows = mx.concatenate([latent, rope], axis=-1)[:, None]
    key, value = rows[..., : row_size // 2], rows[..., row_size // 2 :]
    pages = kv_cache.reshape(blocks * block_size, 2, 1, 1, row_size // 2)
    pages, order_token = kernels.reshape_and_cache(key, value, pages, slot_mapping)
    return pages.reshape(kv_cache.shape), order_token


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
    """Attend each row, by absorbed queries, to the latents of its own request up to its own position.

    The score of a cached row is ``scale * (query . latent + query_rope . rope)``; its value is the latent.
    All query heads read the same row. The softmax is in float32.

    Args:
        query: Queries times the up-projection of keys, so that they meet latents; in the batch's order. With
            ``projections``, before that product.
        query_rope: Rotary parts of the queries.
        kv_cache: Pages of one layer; a row is the latent, then the rotary key.
        batch: Which rows belong to which request, and the blocks of each.
        scale: Factor on the scores.
        order_token: What the write of this step's rows returned.
        projections: The layer's, for queries that are not absorbed: prompts then attend to expanded keys and values
            where that is less work.

    Returns:
        Weighted latents, to be multiplied with the up-projection of values; with ``projections``, they are.

    Raises:
        MetalKernelsError: Shapes, the batch and the cache do not fit together.
    """
    require_latent_cache("mla_attention", kv_cache)
    q_heads, latent_size = query.shape[1:]
    if projections is not None:
        latent_size = kv_cache.shape[2] - query_rope.shape[2]
    rope_size = kv_cache.shape[2] - latent_size
    require_rows("mla_attention", "query", query, (batch.num_tokens, q_heads, query.shape[2]))
    require_rows("mla_attention", "query_rope", query_rope, (batch.num_tokens, q_heads, rope_size))
    require_blocks("mla_attention", batch, kv_cache.shape[1])
    attend: Callable[..., mx.array] = reference.mla_attention
    if kernels.move_pages(kv_cache):
        decode = kernels.mla_decode_kernel(target(), query.dtype, kv_cache.dtype, latent_size, rope_size)
        attend = partial(kernels.mla_attention, decode=decode)
    options: dict[str, Any] = {"scale": scale, "order_token": order_token, "projections": projections}
    return attend(query, query_rope, kv_cache, batch, **options)


def read_pages(
    kv_cache: Float[mx.array, "blocks block_size *row"], batch: RaggedBatch, *, order_token: mx.array | None = None
) -> tuple[Float[mx.array, "own_blocks block_size *row"], RaggedBatch]:
    """Return pages that plain MLX operations may read, and the batch whose block table points into them.

    On a GPU these are copies of the blocks of the batch's requests, made after ``order_token``: MLX does not see
    writes in place. Elsewhere they are the cache itself.

    Args:
        kv_cache: Pages of one layer, of any kind.
        batch: The step.
        order_token: Of the last write.
    """
    if not kernels.move_pages(kv_cache):
        return kv_cache, batch
    return kernels.own_pages(kv_cache, batch, order_token)
