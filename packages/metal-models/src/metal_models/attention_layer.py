"""Layers that keep keys and values, and what is seen of them while a model is traced."""

from dataclasses import dataclass, field

import mlx.core as mx

from metal_kv.pool import KVCachePool
from metal_kv.spec import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from metal_models.cache_view import CacheView, PagedView, Step
from metal_models.decode_views import DecodeView, RowStep, attention_packer
from metal_models.latent_layer import LatentLayer
from metal_models.layer import Layer, UnusedLayer


@dataclass(frozen=True)
class AttentionLayer(Layer):
    """A layer that stores keys and values and attends over them.

    Attributes:
        num_kv_heads: Heads of keys and values.
        key_size: Width of a key.
        value_size: Width of a value.
        dtype: Of the stored rows.
        window: Widest window that a read of this layer asks for; None reads everything.
        kept: What the model's own cache would keep: the window of reads that ask for none.
        q_heads: Most heads of queries that read it.
    """

    num_kv_heads: int
    key_size: int
    value_size: int
    dtype: mx.Dtype
    window: int | None
    kept: int | None = None
    q_heads: int = field(default=0, compare=False)

    def specs(self, name: str, block_size: int) -> dict[str, KVCacheSpec]:
        """Return the one spec; narrower keys or values are padded to the wider of the two."""
        head_size = max(self.key_size, self.value_size)
        if self.window is None:
            full = FullAttentionSpec(
                block_size=block_size, num_kv_heads=self.num_kv_heads, head_size=head_size, dtype=self.dtype
            )
            return {f"{name}.attn": full}
        sliding = SlidingWindowSpec(
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=head_size,
            dtype=self.dtype,
            sliding_window=self.window,
        )
        return {f"{name}.attn": sliding}

    def view(self, name: str, step: Step, pool: KVCachePool) -> PagedView:
        """Return a view over the layer's pages."""
        return PagedView(step, self.kept, pool.layer(f"{name}.attn"), self.key_size, self.value_size)

    def decode_view(self, name: str, step: RowStep, pool: KVCachePool) -> DecodeView:
        """Return a view for compiled steps."""
        cache = pool.layer(f"{name}.attn")
        packer = attention_packer(cache, self.window, self.q_heads, in_place=step.in_place)
        return DecodeView(step, self.kept, cache, (self.key_size, self.value_size), packer)


class NotingView(CacheView):
    """Stores nothing and returns zeros, noting shapes and windows."""

    def __init__(self, step: Step, window: int | None) -> None:
        super().__init__(step, window)
        self.stored: tuple[mx.array, mx.array] | None = None
        self.reads: list[int | None] = []
        self.latent_reads = 0
        self.q_heads = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Note the rows and return them."""
        if self.stored is not None:
            raise TypeError("a layer stores keys and values more than once")
        if keys.ndim != 4 or keys.shape[2] != 1 or keys.shape[:3] != values.shape[:3]:
            raise TypeError(f"a layer stores keys {keys.shape} with values {values.shape}")
        self.stored = (keys, values)
        return super().update_and_fetch(keys, values)

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: object = None,
        soft_cap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Note the window and return zeros as wide as a value."""
        del scale, soft_cap, sinks
        self.reads.append(self.window_of(mask))
        self.q_heads = max(self.q_heads, queries.shape[1])
        _, values = self.keys_and_values()
        return mx.zeros((*queries.shape[:3], values.shape[-1]), queries.dtype)

    def attend_latent(self, queries: mx.array, rope_scores: mx.array, *, scale: float) -> mx.array:
        """Note that the rows are latents and return zeros as wide as one."""
        del rope_scores, scale
        latent, _ = self.keys_and_values()
        if queries.shape[-1] != latent.shape[-1] or latent.shape[1] != 1:
            raise TypeError(f"a layer reads latents {latent.shape} with queries {queries.shape}")
        self.latent_reads += 1
        self.q_heads = max(self.q_heads, queries.shape[1])
        return mx.zeros(queries.shape, queries.dtype)

    def note(self) -> Layer:
        """Return what was seen; rows that are never values are kept as latents without a rotary part."""
        if self.stored is None:
            return UnusedLayer(self.window)
        keys, values = self.stored
        if values.shape[-1] == 0 and not self.reads and self.window is None:
            return LatentLayer(keys.shape[-1], 0, keys.dtype)
        if self.latent_reads and not self.reads and self.window is None:
            return LatentLayer(keys.shape[-1], values.shape[-1], keys.dtype, self.q_heads)
        if not self.reads or self.latent_reads:
            raise TypeError("a layer attends with code of its own instead of the shared attention function")
        windows = [window for window in self.reads if window is not None]
        window = max(windows) if len(windows) == len(self.reads) else None
        sizes = (keys.shape[1], keys.shape[-1], values.shape[-1])
        return AttentionLayer(*sizes, keys.dtype, window, self.window, self.q_heads)
