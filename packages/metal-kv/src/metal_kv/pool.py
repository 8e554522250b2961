"""The arrays that hold cached rows, and their layers' access to them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import (
    RaggedBatch,
    concat_and_cache_mla,
    copy_blocks,
    mla_attention,
    read_pages,
    reference,
    target,
)
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.errors import MetalKVError
from metal_kv.key_value_pages import attend_rows, write_rows
from metal_kv.layout import CacheLayout, LayerPlace
from metal_kv.recurrent_state import movable_pages, read_states, write_states
from metal_kv.spec import AttentionSpec, KVCacheSpec, LatentSpec, RecurrentStateSpec

_Result = TypeVar("_Result")
_BLOCKS_AT_ONCE = 256


def _view(array: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Reinterpret a contiguous array whose first axis counts pages; lazy, no copy, donatable."""
    if array.dtype != dtype:
        array = array.reshape(array.shape[0], -1).view(dtype)
    return array if array.shape == shape else array.reshape(shape)


class _Slab:
    """One allocation of pages: the only owner of its array.

    MLX writes an array in place only if nothing else refers to it once the write is evaluated. So the
    slab keeps the newest array only, and on CPU, where layers of several groups take turns on one slab
    within a step, it evaluates the reads of the one before it lets the next one write.
    """

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype, *, shared: bool) -> None:
        self.array = mx.zeros(shape, dtype)
        self._shared = shared and target() == "cpu"
        self._reads: list[mx.array] = []
        self.state_token: mx.array | None = None
        """Of the last write in place whose reader is in a later step."""

    def view(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return _view(self.array, shape, dtype)

    def rewrite(
        self, shape: tuple[int, ...], dtype: mx.Dtype, write: Callable[[mx.array], tuple[mx.array, _Result]]
    ) -> _Result:
        """Replace the array by the first thing that ``write`` makes of its view; return the second."""
        if self._reads:
            mx.eval(self._reads)
            self._reads.clear()
        self.array, result = write(self.view(shape, dtype))
        return result

    def note_read(self, output: mx.array) -> None:
        """Remember that ``output`` reads the array, by a scalar with a buffer of its own."""
        if self._shared and output.size:
            self._reads.append(output[0, 0].astype(mx.float32).sum())

    def note_copies(self, copies: Sequence[mx.array]) -> None:
        """Remember that ``copies`` are taken from the array, which is rewritten in the same step."""
        if target() == "cpu":
            self._reads.extend(copies)

    def pending(self) -> list[mx.array]:
        """Arrays to evaluate so that everything built so far on this slab is done."""
        tokens = [] if self.state_token is None else [self.state_token]
        return [self.array, *self._reads, *tokens]

    def clear(self) -> None:
        """Set every page to zero."""
        shape, dtype = self.array.shape, self.array.dtype
        self._reads.clear()
        self.state_token = None
        del self.array  # first: never two of them
        self.array = mx.zeros(shape, dtype)
        mx.eval(self.array)

    def keep_state_token(self, order_token: mx.array) -> None:
        """Keep what orders the next step's reads after this write, where writes are in place."""
        if target() != "cpu":
            self.state_token = order_token


class LayerCache:
    """One layer's pages in a pool.

    Attributes:
        name: The layer's name.
        group: Index of its cache group: which block table and metadata of a step are its own.
        spec: What it keeps per allocated block.
    """

    def __init__(self, name: str, place: LayerPlace, slab: _Slab) -> None:
        self.name = name
        self.group = place.group
        self.spec: KVCacheSpec = place.spec
        self._shape = place.view_shape
        self._slab = slab

    @property
    def kv_cache(self) -> mx.array:
        """The layer's pages, ``[blocks, *page_shape]``, as last written.

        Lazy. Do not keep it: a later write copies the whole slab if this array is still alive.
        """
        return self._slab.view(self._shape, self.spec.page_dtype)

    def write(
        self,
        key: Float[mx.array, "tokens kv_heads head_size"],
        value: Float[mx.array, "tokens kv_heads head_size"],
        metadata: AttentionMetadata,
    ) -> mx.array:
        """Write the keys and values of a step's rows to their slots.

        Args:
            key: Keys, rotated; converted to the cache's dtype, or quantised.
            value: Values; converted likewise.
            metadata: The step as this layer's group sees it.

        Returns:
            An array that orders later reads of the same step after this write: hand it to ``attend``.
        """
        spec = self._attention_spec("write")
        expected = (metadata.num_tokens, spec.num_kv_heads, spec.head_size)
        if key.shape != expected or value.shape != expected:
            raise MetalKVError(
                f"[LayerCache.write] expected keys and values of shape {expected} for layer {self.name!r}, "
                f"got {key.shape} and {value.shape}. The layer's spec must match its model."
            )
        return self._slab.rewrite(
            self._shape, spec.page_dtype, lambda pages: write_rows(spec, key, value, pages, metadata.slot_mapping)
        )

    def attend(
        self,
        query: Float[mx.array, "tokens q_heads head_size"],
        metadata: AttentionMetadata,
        *,
        scale: float,
        soft_cap: float | None = None,
        sinks: Float[mx.array, "q_heads"] | None = None,
        sliding_window: int | None = None,
        order_token: mx.array | None = None,
        key: Float[mx.array, "tokens kv_heads head_size"] | None = None,
        value: Float[mx.array, "tokens kv_heads head_size"] | None = None,
    ) -> Float[mx.array, "tokens q_heads head_size"]:
        """Return attention of a step's rows over the cached context of their requests, themselves included.

        Args:
            query: Queries, rotated.
            metadata: The step as this layer's group sees it.
            scale: Factor of the scores.
            soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; None for no cap.
            sinks: One extra logit per head that takes part in the softmax and has no value.
            sliding_window: Positions a row sees, its own included; None for what the spec says.
            order_token: What ``write`` of the same step returned.
            key: What ``write`` was given, where it is at hand: requests without earlier rows may be read from it.
            value: Likewise.
        """
        spec = self._attention_spec("attend")
        output = attend_rows(
            spec,
            query,
            self.kv_cache,
            metadata.batch,
            scale=scale,
            sliding_window=sliding_window or spec.window,
            soft_cap=soft_cap,
            sinks=sinks,
            order_token=order_token,
            key=key,
            value=value,
        )
        self._slab.note_read(output)
        return output

    def write_latent(
        self,
        latent: Float[mx.array, "tokens latent_size"],
        rope: Float[mx.array, "tokens rope_size"],
        metadata: AttentionMetadata,
    ) -> mx.array:
        """Write the latent rows of a step to their slots.

        Args:
            latent: Compressed keys and values; converted to the cache's dtype.
            rope: Rotary parts of the keys; converted likewise.
            metadata: The step as this layer's group sees it.

        Returns:
            An array that orders later reads of the same step after this write.
        """
        spec = self._latent_spec("write_latent")
        sizes = (latent.shape, rope.shape)
        expected = ((metadata.num_tokens, spec.latent_size), (metadata.num_tokens, spec.rope_size))
        if sizes != expected:
            raise MetalKVError(
                f"[LayerCache.write_latent] expected latents and rotary keys of shapes {expected} for layer "
                f"{self.name!r}, got {sizes}. The layer's spec must match its model."
            )
        return self._slab.rewrite(
            self._shape,
            spec.dtype,
            lambda kv_cache: concat_and_cache_mla(
                latent.astype(spec.dtype), rope.astype(spec.dtype), kv_cache, metadata.slot_mapping
            ),
        )

    def attend_latent(
        self,
        query_latent: Float[mx.array, "tokens q_heads latent_size"],
        query_rope: Float[mx.array, "tokens q_heads rope_size"],
        metadata: AttentionMetadata,
        *,
        scale: float,
        order_token: mx.array | None = None,
        use_kernel: bool = True,
    ) -> Float[mx.array, "tokens q_heads latent_size"]:
        """Return latent attention of a step's rows over the cached context of their requests.

        Args:
            query_latent: Absorbed queries; see ``metal_kernels.mla_attention``.
            query_rope: Rotary parts of the queries.
            metadata: The step as this layer's group sees it.
            scale: Factor of the scores.
            order_token: What ``write_latent`` of the same step returned.
            use_kernel: False for plain MLX over gathered rows, also where a kernel would serve.
        """
        self._latent_spec("attend_latent")
        kv_cache, batch, attend = self.kv_cache, metadata.batch, mla_attention
        if not use_kernel:
            kv_cache, batch = read_pages(kv_cache, batch, order_token=order_token)
            attend = reference.mla_attention
        output = attend(query_latent, query_rope, kv_cache, batch, scale=scale, order_token=order_token)
        self._slab.note_read(output)
        return output

    def read(
        self,
        metadata: AttentionMetadata,
        use: Callable[[mx.array, RaggedBatch], mx.array],
        order_token: mx.array | None = None,
    ) -> mx.array:
        """Return what ``use`` makes of the layer's pages: for attention that is no kernel's.

        Args:
            metadata: The step as this layer's group sees it.
            use: Takes pages ``[blocks, *page_shape]`` and the batch whose block table points into them, keeps
                neither, and returns an array ``[tokens, …]``.
            order_token: What the write of the same step returned.
        """
        output = use(*read_pages(self.kv_cache, metadata.batch, order_token=order_token))
        self._slab.note_read(output)
        return output

    def read_states(self, block_ids: Int32[mx.array, "states"]) -> tuple[mx.array, ...]:
        """Return the states in some blocks: for each array of a state, ``[states, *shape]``."""
        spec = self._state_spec("read_states")
        pages = self._slab.view(*movable_pages(self._shape[0], spec.page_size_bytes))
        states = read_states(pages, block_ids, spec, self._slab.state_token)
        self._slab.note_copies(states)
        return states

    def write_states(self, states: Sequence[mx.array], block_ids: Int32[mx.array, "states"]) -> None:
        """Replace the states in some blocks; a later step reads them.

        Args:
            states: For each array of a state ``[states, *shape]``; converted to the cache's dtypes. On a GPU they
                follow from what ``read_states`` returned for the same blocks in this step, if it was called.
            block_ids: Blocks, all different, none of them the null block.
        """
        spec = self._state_spec("write_states")
        expected = tuple((block_ids.size, *shape) for shape in spec.shapes)
        if tuple(state.shape for state in states) != expected:
            raise MetalKVError(
                f"[LayerCache.write_states] expected arrays of shapes {expected} for layer {self.name!r}, got "
                f"{tuple(state.shape for state in states)}. The layer's spec must match its model."
            )
        shape, dtype = movable_pages(self._shape[0], spec.page_size_bytes)
        token = self._slab.rewrite(shape, dtype, lambda pages: write_states(pages, block_ids, spec, states))
        self._slab.keep_state_token(token)

    @property
    def order_token(self) -> mx.array | None:
        """What the next read of states follows, where writes are in place; None if there was no write."""
        return self._slab.state_token

    def follow(self, order_token: mx.array) -> None:
        """Let the next read of states follow ``order_token``: for steps that write states without this object."""
        self._slab.keep_state_token(order_token)

    def update(self, write: Callable[[mx.array], mx.array]) -> None:
        """Replace the layer's pages by ``write(pages)``; what recurrent layers write with.

        Args:
            write: Takes ``kv_cache`` and returns an array of the same shape and dtype built from it; it keeps
                no reference to what it was given, so that MLX can write in place.
        """
        self._slab.rewrite(self._shape, self.spec.page_dtype, lambda pages: (write(pages), None))

    def _state_spec(self, operation: str) -> RecurrentStateSpec:
        if not isinstance(self.spec, RecurrentStateSpec):
            raise MetalKVError(
                f"[LayerCache.{operation}] expected a recurrent layer, got {type(self.spec).__name__} for layer "
                f"{self.name!r}. Use write and attend for keys and values."
            )
        return self.spec

    def _attention_spec(self, operation: str) -> AttentionSpec:
        if not isinstance(self.spec, AttentionSpec):
            raise MetalKVError(
                f"[LayerCache.{operation}] expected a layer with keys and values, got "
                f"{type(self.spec).__name__} for layer {self.name!r}. "
                "Use write_latent for latent rows, update for states."
            )
        return self.spec

    def _latent_spec(self, operation: str) -> LatentSpec:
        if not isinstance(self.spec, LatentSpec):
            raise MetalKVError(
                f"[LayerCache.{operation}] expected a layer with latent rows, got "
                f"{type(self.spec).__name__} for layer {self.name!r}. Use write and attend for keys and values."
            )
        return self.spec


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
            _Slab(
                first[slab].view_shape,
                first[slab].spec.page_dtype,
                shared=users.count(slab) > 1,
            )
            for slab in range(layout.num_slabs)
        ]
        mx.eval(self.arrays())
        self._layers = {name: LayerCache(name, place, self._slabs[place.slab]) for name, place in places.items()}

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
        mx.eval(self.arrays())
        mx.synchronize()  # a step in flight may still write in place
        for slab, page_size in zip(self._slabs, self.layout.page_sizes, strict=True):
            shape, dtype = movable_pages(self.layout.num_blocks, page_size)
            copy = partial(copy_blocks, src_blocks=sources, dst_blocks=destinations)
            mx.eval(slab.rewrite(shape, dtype, copy), slab.array)
