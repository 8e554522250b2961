"""The one place where mlx-lm is changed: attention asks a paged view, and every rotary embedding takes positions."""

import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models import base, rope_utils

from metal_models.cache_view import OWN_MASK, CacheView, PagedMask
from metal_models.dynamic_rope import DynamicNTKScalingRoPE
from metal_models.errors import MetalModelsError

_mlx_lm_attention = base.scaled_dot_product_attention


def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend through the paged cache when one of its views is involved, else as mlx-lm does."""
    if isinstance(mask, PagedMask):
        return mask.step.owner(keys, cache).attend(queries, scale=scale, mask=mask, sinks=sinks)
    if isinstance(cache, CacheView):
        if isinstance(mask, mx.array) and keys is values:
            return cache.step.owner(keys, cache).attend_latent(queries, mask, scale=scale)
        if isinstance(mask, mx.array):
            raise MetalModelsError(OWN_MASK)
        return cache.step.owner(keys, cache).attend(queries, scale=scale, sinks=sinks)
    return _mlx_lm_attention(queries, keys, values, cache, scale, mask, sinks)


def install() -> None:
    """Put the function above in place of mlx-lm's, also where a model file has already imported it.

    Idempotent. Models that run on mlx-lm's own caches are not affected.
    """
    rope_utils.DynamicNTKScalingRoPE = DynamicNTKScalingRoPE  # type: ignore[misc]
    base.scaled_dot_product_attention = scaled_dot_product_attention
    for name, module in list(sys.modules.items()):
        if (
            name.startswith("mlx_lm.models.")
            and getattr(module, "scaled_dot_product_attention", None) is _mlx_lm_attention
        ):
            module.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]
