"""What a model's cache and weights will take, from its configuration alone."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from metal_kernels import ElementFormat
from metal_kv import CacheGroup, group_layers, quantize_specs, unify_page_sizes
from metal_models.model import PagedModel
from metal_models.registry import build
from metal_models.weights import format_of


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


def converted_weight_bytes(config: dict[str, Any], *, dtype: mx.Dtype) -> int | None:
    """Return what the weights of another library's quantised checkpoint take once they are loaded.

    Args:
        config: As in the model's ``config.json``: no weights are read.
        dtype: What the model computes in.

    Returns:
        Bytes; None for a checkpoint that is loaded as it is stored.

    Raises:
        UnsupportedModelError: The architecture does not run over the paged cache.
        MetalModelsError: The format is not known.
    """
    if (form := format_of(config)) is None:
        return None
    module = build(config)
    leaves: Any = tree_flatten(module.parameters())
    total: int = sum(array.size for _, array in leaves) * dtype.size
    for path, layer in module.named_modules():
        if type(layer) not in (nn.Linear, SwitchLinear) or form.leaves_out(path):
            continue
        if (kept := form.format.kept(path, form.settings)) is not None:
            scale_bytes = 2 * dtype.size if kept.mode == "affine" else 1
            total += layer.weight.size * kept.bits // 8 + layer.weight.size // kept.group_size * scale_bytes
            total -= layer.weight.size * dtype.size
    return total
