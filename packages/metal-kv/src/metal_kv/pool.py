"""The arrays that hold cached rows: allocated once, shared by the layers of a model."""

from collections.abc import Collection, Sequence
from functools import partial

import mlx.core as mx

from metal_kernels import copy_blocks, target
from metal_kv.errors import MetalKVError
from metal_kv.kept_rows import DecodeRuns
from metal_kv.layer_cache import LayerCache
from metal_kv.layout import CacheLayout, LayerPlace
from metal_kv.recurrent_state import movable_pages
from metal_kv.slab import Slab
from metal_kv.spec import AttentionSpec, KVCacheSpec, RecurrentStateSpec

_BLOCKS_AT_ONCE = 256


class KVCachePool:
    """All cache memory of a model, allocated once.

    Each slab is one array; the layers that share it see the same bytes, each in the shape of its own spec.

    Invariants (``tests/test_pool.py``): a written row is read back until its block is reused; a write never
    copies a slab when each step is evaluated before the next is built; the null block stays zero.

    Args:
        layout: Which layers lie where; every slab is allocated, zeroed and evaluated here.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        places = layout.places()
        first = {place.slab: place for place in reversed(list(places.values()))}
        users = [place.slab for place in places.values()]
        self._slabs = [
            Slab(
                first[slab].view_shape,
                first[slab].spec.page_dtype,
                shared=users.count(slab) > 1,
            )
            for slab in range(layout.num_slabs)
        ]
        mx.eval(self.arrays())
        self._runs = _decode_runs(places.values(), layout.nbytes)
        self._layers = {
            name: LayerCache(
                name, place, self._slabs[place.slab], self._runs.get(place.group) if _keeps_rows(place.spec) else None
            )
            for name, place in places.items()
        }

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of all layers, group by group."""
        return tuple(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self.layout.nbytes

    def layer(self, name: str) -> LayerCache:
        """Return the cache of one layer."""
        try:
            return self._layers[name]
        except KeyError:
            raise MetalKVError(
                f"[KVCachePool.layer] expected one of {list(self._layers)}, got {name!r}. "
                "Use the names the layout was made with."
            ) from None

    def state_layers(self) -> list[LayerCache]:
        """Return the caches of the layers that keep recurrent states."""
        return [layer for layer in self._layers.values() if isinstance(layer.spec, RecurrentStateSpec)]

    def arrays(self) -> list[mx.array]:
        """Return what to evaluate together with a step's outputs so that its writes are done.

        On CPU, evaluate them before building the next step, and drop the list: while it lives, writes copy.
        """
        return [array for slab in self._slabs for array in slab.pending()]

    def reset(self) -> None:
        """Set all pages of all slabs to zero; evaluated before it returns."""
        if target() != "cpu":  # in place: others may hold the arrays
            for first in range(1, self.layout.num_blocks, _BLOCKS_AT_ONCE):
                self.zero_blocks(range(first, min(first + _BLOCKS_AT_ONCE, self.layout.num_blocks)))
            return
        mx.eval(self.arrays())
        for layer in self._layers.values():
            layer.forget_rows()
        for slab in self._slabs:
            slab.clear()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks over all slabs, ``(source, destination)`` each; evaluated before it returns.

        Raises:
            MetalKVError: A block outside the pool, or a destination that is the null block, named twice or
                itself a source.
        """
        if pairs:
            self._check_pairs(pairs)
            for runs in self._runs.values():
                runs.forget([destination for _, destination in pairs])
            sources, destinations = (mx.array(ids, mx.int32) for ids in zip(*pairs, strict=True))
            self._copy(sources, destinations)

    def zero_blocks(self, block_ids: Sequence[int]) -> None:
        """Set whole blocks to zero over all slabs; evaluated before it returns.

        Raises:
            MetalKVError: A block outside the pool.
        """
        block_ids = sorted(set(block_ids) - {0})
        self.copy_blocks([(0, block_id) for block_id in block_ids])

    def _check_pairs(self, pairs: Sequence[tuple[int, int]]) -> None:
        sources, destinations = zip(*pairs, strict=True)
        num_blocks = self.layout.num_blocks
        if not (
            0 <= min(sources) <= max(sources) < num_blocks and 1 <= min(destinations) <= max(destinations) < num_blocks
        ):
            raise MetalKVError(
                f"[KVCachePool.copy_blocks] expected sources in 0..{num_blocks - 1} and destinations in "
                f"1..{num_blocks - 1}, got {list(pairs)}. Pass ids of the allocator of this pool."
            )
        if len(set(destinations)) < len(destinations) or set(destinations) & set(sources):
            raise MetalKVError(
                f"[KVCachePool.copy_blocks] expected every destination once and none among the sources, "
                f"got {list(pairs)}. Copy in several calls."
            )

    def _copy(self, sources: mx.array, destinations: mx.array) -> None:
        for slab in self._slabs:
            slab.settle()
        mx.eval(self.arrays())
        mx.synchronize()  # a step in flight may still write in place
        for slab, page_size in zip(self._slabs, self.layout.page_sizes, strict=True):
            shape, dtype = movable_pages(self.layout.num_blocks, page_size)
            copy = partial(copy_blocks, src_blocks=sources, dst_blocks=destinations)
            mx.eval(slab.rewrite(shape, dtype, copy), slab.array)


def _keeps_rows(spec: KVCacheSpec) -> bool:
    """Tell whether a layer's keys and values may be kept beside their pages."""
    return isinstance(spec, AttentionSpec) and spec.rows is None


def _decode_runs(places: Collection[LayerPlace], pool_bytes: int) -> dict[int, DecodeRuns]:
    """Return what tells the layers of each group on a CPU how steps follow one another."""
    if target() != "cpu":
        return {}
    specs = [place.spec for place in places if isinstance(place.spec, AttentionSpec) and _keeps_rows(place.spec)]
    row_bytes = sum(2 * spec.num_kv_heads * spec.head_size * mx.float32.size for spec in specs)
    return {place.group: DecodeRuns(row_bytes, pool_bytes) for place in places}
