"""Which layers form a group, where no scheduler has said so."""

from collections.abc import Mapping
from dataclasses import replace

from metal_kv.errors import SpecError
from metal_kv.layout import CacheGroup
from metal_kv.spec import AttentionSpec, KVCacheSpec, RecurrentStateSpec, with_block_size

_FEW_EXTRA_LAYERS = 1.5


def group_layers(specs: Mapping[str, KVCacheSpec]) -> list[CacheGroup]:
    """Return the groups that vLLM's scheduler makes of a model's layers.

    Layers that see equally much form one group. Otherwise blocks grow until all pages are equally large, and each
    kind is cut into groups of equally many layers, so that a block id costs the same whichever group has it.

    Args:
        specs: What each layer keeps, by name.

    Raises:
        SpecError: Pages that no whole number of tokens makes equal.
    """
    if len({_kind(spec) for spec in specs.values()}) == 1:
        return [CacheGroup(tuple(specs), tuple(specs.values()))]
    buckets: dict[KVCacheSpec, list[str]] = {}
    for name, spec in _equal_pages(specs).items():
        buckets.setdefault(spec, []).append(name)
    counts = [len(names) for names in buckets.values()]
    size = max(counts) if max(counts) < min(counts) * _FEW_EXTRA_LAYERS else min(counts)
    return [
        CacheGroup(tuple(names[first :: -(-len(names) // size)]), spec)
        for spec, names in buckets.items()
        for first in range(-(-len(names) // size))
    ]


def _kind(spec: KVCacheSpec) -> object:
    """What decides how many blocks of a request a layer still needs."""
    if isinstance(spec, RecurrentStateSpec):
        return spec
    return spec.window if isinstance(spec, AttentionSpec) else None


def _equal_pages(specs: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    largest = max(spec.page_size_bytes for spec in specs.values())
    scaled: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        if isinstance(spec, RecurrentStateSpec):
            scaled[name] = replace(spec, page_size_padded=largest)
            continue
        ratio, rest = divmod(largest, spec.page_size_bytes)
        if rest:
            raise SpecError(
                f"[group_layers] expected pages that divide {largest} bytes, got {spec.page_size_bytes} for layer "
                f"{name!r}. Choose another block size, or another format of the cache."
            )
        scaled[name] = with_block_size(spec, spec.block_size * ratio)
    return scaled
