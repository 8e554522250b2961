"""Latent attention of families whose mlx-lm code caches expanded keys and values."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_models.cache_view import CacheView
from metal_models.errors import MetalModelsError


def attend(module: Any, x: mx.array, cache: CacheView, scale: float) -> mx.array:
    """Attend from rows ``[tokens, 1, hidden]`` over latents, with the weights of ``module`` absorbed.

    Args:
        module: An attention module with DeepSeek-V2's parts: ``kv_a_proj_with_mqa``, ``kv_b_proj`` and their sizes.
        x: Normed hidden rows.
        cache: The layer's view.
        scale: Factor of the scores.
    """
    tokens, heads, nope = x.shape[0], module.num_heads, module.qk_nope_head_dim
    if module.q_lora_rank is None:
        queries = module.q_proj(x)
    else:
        queries = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x)))
    queries = queries.reshape(tokens, heads, 1, module.q_head_dim)
    query, query_rope = mx.split(queries, [nope], axis=-1)
    latent, key_rope = mx.split(module.kv_a_proj_with_mqa(x), [module.kv_lora_rank], axis=-1)
    latent = module.kv_a_layernorm(latent)[:, None]
    query_rope = module.rope(query_rope, cache.offset)
    key_rope = module.rope(key_rope[:, None], cache.offset)

    _, rope_keys = cache.update_and_fetch(latent, key_rope)
    absorbed = _by_head(module.kv_b_proj, query, slice(None, nope), transpose=False)
    rope_scores = (query_rope * scale) @ rope_keys.swapaxes(-1, -2)
    weighted = cache.attend_latent(absorbed, rope_scores, scale=scale)
    out = _by_head(module.kv_b_proj, weighted, slice(nope, None), transpose=True)
    output: mx.array = module.o_proj(out.reshape(tokens, 1, -1))
    return output


def _by_head(projection: nn.Module, rows: mx.array, part: slice, *, transpose: bool) -> mx.array:
    """Multiply ``rows`` ``[tokens, heads, 1, size]`` by some output rows of every head of ``projection``.

    Slices of the stored weight, quantised or not, are used as they are; with ``transpose`` the weight maps latents
    to those outputs, as in the projection itself, else it maps outputs back to latents.
    """
    heads = rows.shape[1]
    by_head = rows.swapaxes(0, 2)  # one matmul of all tokens for each head

    def slices(name: str) -> mx.array:
        weight: mx.array = projection[name]
        return weight.reshape(heads, -1, weight.shape[-1])[:, part]

    if isinstance(projection, nn.QuantizedLinear):
        out = mx.quantized_matmul(
            by_head,
            slices("weight"),
            scales=slices("scales"),
            biases=slices("biases") if "biases" in projection else None,
            transpose=transpose,
            group_size=projection.group_size,
            bits=projection.bits,
            mode=projection.mode,
        )
    elif isinstance(projection, nn.Linear):
        weight = slices("weight")
        out = by_head @ (weight.swapaxes(-1, -2) if transpose else weight)
    else:
        raise MetalModelsError(
            f"[latent attention] expected kv_b_proj to be a linear layer, got {type(projection).__name__}. "
            "Leave kv_b_proj out of the adapter's target modules."
        )
    return out.swapaxes(0, 2)
