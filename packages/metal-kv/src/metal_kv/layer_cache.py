"""One layer's pages in a pool: written, attended over, read and rewritten."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import (
    LatentProjections,
    RaggedBatch,
    concat_and_cache_mla,
    mla_attention,
    read_pages,
    reference,
    target,
)
from metal_kernels.reference.attention import attend_dense
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.errors import MetalKVError
from metal_kv.kept_rows import DecodeRuns, KeptRows, visible
from metal_kv.key_value_pages import attend_rows, write_rows
from metal_kv.layout import LayerPlace
from metal_kv.recurrent_state import BlockIds, movable_pages, read_states, write_states
from metal_kv.slab import Slab
from metal_kv.spec import AttentionSpec, KVCacheSpec, LatentSpec, RecurrentStateSpec
from metal_kv.waiting_states import WaitingStates


class LayerCache:
    """One layer's pages in a pool.

    Attributes:
        name: The layer's name.
        group: Index of its cache group: which block table and metadata of a step are its own.
        spec: What it keeps per allocated block.
    """

    def __init__(self, name: str, place: LayerPlace, slab: Slab, runs: DecodeRuns | None = None) -> None:
        self.name = name
        self.group = place.group
        self.spec: KVCacheSpec = place.spec
        self._shape = place.view_shape
        self._slab = slab
        self._runs = runs
        self._kept: KeptRows | None = None
        self._written: RaggedBatch | None = None
        self._waiting: WaitingStates | None = None
        if isinstance(place.spec, RecurrentStateSpec) and target() == "cpu":
            self._waiting = WaitingStates(place.spec, place.view_shape[0])
            slab.waiting.append(self._waiting)

    @property
    def kv_cache(self) -> mx.array:
        """The layer's pages, ``[blocks, *page_shape]``, as last written.

        Lazy. Do not keep it: a later write copies the whole slab if this array is still alive.
        """
        if self._waiting is not None:
            self._slab.settle(self._waiting.block_ids)
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
        if self._runs is not None:
            at, kept = self._runs.at(metadata.batch), self._kept
            self._written = metadata.batch
            if kept is not None and at != (kept.run, kept.index + 1):
                self._kept = None
        return self._slab.rewrite(
            self._shape,
            spec.page_dtype,
            lambda pages: write_rows(spec, key, value, pages, metadata),
            blocks=self._written_blocks(metadata),
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
        window = sliding_window or spec.window
        kept = self._kept_rows(metadata.batch, window, key, value)
        if kept is not None:
            return attend_dense(
                query,
                kept.keys[:, :, : kept.end],
                kept.values[:, :, : kept.end],
                visible(metadata.batch),
                scale=scale,
                soft_cap=soft_cap,
                sinks=sinks,
            )
        output = attend_rows(
            spec,
            query,
            self.kv_cache,
            metadata.batch,
            scale=scale,
            sliding_window=window,
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
            blocks=self._written_blocks(metadata),
        )

    def attend_latent(
        self,
        query: Float[mx.array, "tokens q_heads query_size"],
        query_rope: Float[mx.array, "tokens q_heads rope_size"],
        metadata: AttentionMetadata,
        *,
        scale: float,
        order_token: mx.array | None = None,
        use_kernel: bool = True,
        projections: LatentProjections | None = None,
    ) -> Float[mx.array, "tokens q_heads value_size"]:
        """Return latent attention of a step's rows over the cached context of their requests.

        Args:
            query: Absorbed queries, or with ``projections`` others; see ``metal_kernels.mla_attention``.
            query_rope: Rotary parts of the queries.
            metadata: The step as this layer's group sees it.
            scale: Factor of the scores.
            order_token: What ``write_latent`` of the same step returned.
            use_kernel: False for plain MLX over gathered rows, also where a kernel would serve.
            projections: The layer's.
        """
        self._latent_spec("attend_latent")
        kv_cache, batch, attend = self.kv_cache, metadata.batch, mla_attention
        if not use_kernel:
            kv_cache, batch = read_pages(kv_cache, batch, order_token=order_token)
            attend = reference.mla_attention
        options: dict[str, Any] = {"scale": scale, "order_token": order_token, "projections": projections}
        output = attend(query, query_rope, kv_cache, batch, **options)
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

    def read_states(self, block_ids: BlockIds | Int32[mx.array, "states"]) -> tuple[mx.array, ...]:
        """Return the states in some blocks: for each array of a state, ``[states, *shape]``."""
        spec, blocks = self._state_spec("read_states"), BlockIds.of(block_ids)
        if self._waiting is not None:
            states = self._waiting.read(blocks.ids)
            if states is not None:
                return states
            if self._waiting.wait_for(blocks.ids):
                self._slab.settle(blocks.ids)
        pages = self._slab.view(*movable_pages(self._shape[0], spec.page_size_bytes))
        states = read_states(pages, blocks.device, spec, self._slab.state_token)
        self._slab.note_copies(states)
        return states

    def write_states(self, states: Sequence[mx.array], block_ids: BlockIds | Int32[mx.array, "states"]) -> None:
        """Replace the states in some blocks; a later step reads them.

        Args:
            states: For each array of a state ``[states, *shape]``; converted to the cache's dtypes. On a GPU they
                follow from what ``read_states`` returned for the same blocks in this step, if it was called.
            block_ids: Blocks, all different, none of them the null block.
        """
        spec, blocks = self._state_spec("write_states"), BlockIds.of(block_ids)
        count = len(blocks.ids)
        if len(states) != len(spec.shapes) or any(
            state.shape != (count, *shape) for state, shape in zip(states, spec.shapes, strict=True)
        ):
            raise MetalKVError(
                f"[LayerCache.write_states] expected arrays of shapes {[(count, *shape) for shape in spec.shapes]} "
                f"for layer {self.name!r}, got {[state.shape for state in states]}. "
                "The layer's spec must match its model."
            )
        if self._waiting is not None:
            self._let_wait(self._waiting, states, blocks.ids)
            return
        shape, dtype = movable_pages(self._shape[0], spec.page_size_bytes)
        token = self._slab.rewrite(shape, dtype, lambda pages: write_states(pages, blocks.device, spec, states))
        self._slab.keep_state_token(token)

    @property
    def order_token(self) -> mx.array | None:
        """What the next read of states follows, where writes are in place; None if there was no write."""
        return self._slab.state_token

    def follow(self, order_token: mx.array) -> None:
        """Let the next read of states follow ``order_token``: for steps that write states without this object."""
        self._slab.keep_state_token(order_token)

    def _kept_rows(
        self, batch: RaggedBatch, window: int | None, key: mx.array | None, value: mx.array | None
    ) -> KeptRows | None:
        """Return the rows of a step's requests where they are kept; None where they are to be read from pages.

        They are gathered in the second step of a run: where every step has other requests, nothing is.
        """
        if self._runs is None or batch is not self._written or key is None or value is None:
            return None
        at = self._runs.at(batch)
        if at is None or at[1] == 0 or (window is not None and window < batch.max_seq_len):
            return None
        kept = self._kept
        if kept is not None and (kept.run, kept.index) == at:
            return kept
        if kept is None or not kept.append(key, value, self.spec.page_dtype):
            self._kept = None  # first: never two of them
            self._kept = KeptRows.gathered(self.kv_cache, batch, at)
        return self._kept

    def forget_rows(self) -> None:
        """Read rows from their pages in the next step: something else than a step has written there."""
        self._kept = None
        if self._runs is not None:
            self._runs.forget()

    def update(self, write: Callable[[mx.array], mx.array]) -> None:
        """Replace the layer's pages by ``write(pages)``; what recurrent layers write with.

        Args:
            write: Takes ``kv_cache`` and returns an array of the same shape and dtype built from it; it keeps
                no reference to what it was given, so that MLX can write in place.
        """
        self.forget_rows()
        self._slab.rewrite(self._shape, self.spec.page_dtype, lambda pages: (write(pages), None))

    def _let_wait(self, waiting: WaitingStates, states: Sequence[mx.array], block_ids: list[int]) -> None:
        """Let states wait for the next step; those of the last step that go on without them go to their pages."""
        if block_ids != waiting.block_ids:
            left = waiting.beside(block_ids)
            if left:
                self._slab.write_waiting(waiting, left)
        waiting.drop()
        self._slab.settle(block_ids)  # states of other layers, whose blocks these were
        waiting.replace(block_ids, states)

    def _written_blocks(self, metadata: AttentionMetadata) -> Collection[int]:
        """Return the blocks that a step's rows are written to, if somebody asks for them."""
        if not self._slab.waiting:
            return ()
        block_size, slots = self.spec.block_size, metadata.slots.host
        return metadata.batch.once(("written blocks", block_size), lambda: set((slots // block_size).tolist()))

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
