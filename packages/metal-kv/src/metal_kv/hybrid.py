"""Pages of equal bytes for models whose layers keep states beside keys and values."""

import math
from collections.abc import Mapping
from dataclasses import replace

from metal_kv.spec import KVCacheSpec, RecurrentStateSpec, with_block_size


def unify_page_sizes(
    specs: Mapping[str, KVCacheSpec], *, state_block_size: int | None = None, blocks_per_request: int = 1
) -> dict[str, KVCacheSpec]:
    """Make the pages of all layers equally large, so that any groups of them can share slabs.

    Blocks of rows grow to the smallest multiple of their size whose page holds the largest state; states are padded
    to that page. Without recurrent layers nothing changes.

    Args:
        specs: What each layer keeps, by name.
        state_block_size: Tokens per block of recurrent layers; None for the longest block of rows.
        blocks_per_request: States that a request holds at once; see ``RecurrentStateSpec``.
    """
    states = {name: spec for name, spec in specs.items() if isinstance(spec, RecurrentStateSpec)}
    if not states:
        return dict(specs)
    rows = {name: spec for name, spec in specs.items() if name not in states}
    largest = max(sum(spec.state_bytes) for spec in states.values())
    unit = math.lcm(4, *(spec.page_size_bytes for spec in rows.values()))
    page_size = unit * math.ceil(largest / unit)
    unified: dict[str, KVCacheSpec] = {
        name: with_block_size(spec, page_size * spec.block_size // spec.page_size_bytes) for name, spec in rows.items()
    }
    block_size = state_block_size or max((spec.block_size for spec in unified.values()), default=0)
    for name, state in states.items():
        unified[name] = replace(
            state,
            block_size=block_size or state.block_size,
            page_size_padded=page_size,
            blocks_per_request=blocks_per_request,
        )
    return {name: unified[name] for name in specs}
