"""A quantised cache for a model: which layers' rows are packed, and into how many bytes."""

import math
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from metal_kernels import ElementFormat, MetalKernelsError, RowFormat
from metal_kv.errors import SpecError
from metal_kv.spec import AttentionSpec, KVCacheSpec, LatentSpec

_ALIGNMENT = 16
_LONGER = 0.1
_FLOATS: dict[mx.Dtype, ElementFormat] = {mx.float16: "float16", mx.bfloat16: "bfloat16", mx.float32: "float32"}


def quantize_specs(
    specs: Mapping[str, KVCacheSpec], key: ElementFormat | None, value: ElementFormat | None
) -> dict[str, KVCacheSpec]:
    """Return ``specs`` with keys and values stored in other formats.

    Layers with different heads get rows padded so that the longest is a whole multiple of each: scaled blocks then
    have pages of equal bytes, and the layers can share memory. States of recurrent layers stay as they are.

    Args:
        specs: What each layer keeps, by name.
        key: Format of keys; None for the layer's own dtype.
        value: Format of values; likewise.

    Raises:
        SpecError: A layer keeps latent rows, or heads of a size that the format cannot store.
    """
    if key is None and value is None:
        return dict(specs)
    formats = {
        name: _row_format(name, spec, key or _FLOATS[spec.dtype], value or _FLOATS[spec.dtype])
        for name, spec in specs.items()
        if isinstance(spec, AttentionSpec)
    }
    for name, spec in specs.items():
        if isinstance(spec, LatentSpec):
            raise SpecError(
                f"[quantize_specs] expected layers with keys and values, got latent rows in layer {name!r}. "
                "Latents are compressed already: leave the cache's dtype as it is."
            )
    padded = _padded_bytes({row_format.content_words * 4 for row_format in formats.values()})
    return {
        name: replace(spec, rows=replace(formats[name], padded_bytes=padded[formats[name].content_words * 4]))
        if isinstance(spec, AttentionSpec)
        else spec
        for name, spec in specs.items()
    }


def _row_format(name: str, spec: AttentionSpec, key: ElementFormat, value: ElementFormat) -> RowFormat:
    try:
        return RowFormat(spec.num_kv_heads, spec.head_size, key, value)
    except MetalKernelsError as error:
        raise SpecError(f"[quantize_specs] layer {name!r} cannot be stored as {key} and {value}: {error}") from error


def _padded_bytes(sizes: set[int]) -> dict[int, int]:
    """Return what each number of bytes is padded to, so that the largest is a multiple of all, and all of 16."""
    if not sizes:
        return {}
    # Rather a slightly longer row in the largest layers than one that is half as long again in the others.
    ratios = {size: int(max(sizes) / size + _LONGER) for size in sizes}
    unit = _ALIGNMENT * math.lcm(*ratios.values())
    longest = max(size * ratio for size, ratio in ratios.items())
    page = -(-longest // unit) * unit
    return {size: page // ratio for size, ratio in ratios.items()}
