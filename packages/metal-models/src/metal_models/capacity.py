"""What a model's cache will take, from its configuration alone."""

from typing import Any

import mlx.core as mx

from metal_kernels import ElementFormat
from metal_kv import CacheGroup, group_layers, quantize_specs, unify_page_sizes
from metal_models.model import PagedModel
from metal_models.registry import build


def cache_groups(
    config: dict[str, Any],
    *,
    dtype: mx.Dtype,
    block_size: int = 16,
    key: ElementFormat | None = None,
    value: ElementFormat | None = None,
) -> list[CacheGroup]:
    """Return the cache groups that a model is served with; no weights are read.

    Args:
        config: As in the model's ``config.json``.
        dtype: What the model computes in.
        block_size: Tokens per block.
        key: Format of cached keys; None for ``dtype``.
        value: Format of cached values; likewise.

    Raises:
        UnsupportedModelError: The architecture does not run over the paged cache.
        SpecError: Its layers cannot be stored in these formats, or cannot share pages.
    """
    module = build(config)
    module.set_dtype(dtype)
    specs = PagedModel(module, config).kv_cache_specs(block_size)
    return group_layers(unify_page_sizes(quantize_specs(specs, key, value)))
