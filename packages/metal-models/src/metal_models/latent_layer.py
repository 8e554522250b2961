"""Layers of multi-head latent attention: one latent row per token, shared by all heads."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from metal_kernels import RaggedBatch
from metal_kv.layer_cache import LayerCache
from metal_kv.pool import KVCachePool
from metal_kv.spec import KVCacheSpec, LatentSpec
from metal_models.cache_view import CacheView, Step
from metal_models.decode_views import LatentDecodeView, RowStep, latent_packer
from metal_models.layer import Layer
from metal_models.row_projections import PENDING


@dataclass(frozen=True)
class LatentLayer(Layer):
    """A layer that stores ``[latent | rope]`` rows and attends with absorbed queries.

    Attributes:
        latent_size: Width of the compressed keys and values.
        rope_size: Width of the rotary part of a key.
        dtype: Of the stored rows.
        q_heads: Most heads of queries that read them.
    """

    latent_size: int
    rope_size: int
    dtype: mx.Dtype
    q_heads: int = field(default=0, compare=False)

    def specs(self, name: str, block_size: int) -> dict[str, KVCacheSpec]:
        """Return the one spec."""
        spec = LatentSpec(
            block_size=block_size, latent_size=self.latent_size, rope_size=self.rope_size, dtype=self.dtype
        )
        return {f"{name}.attn": spec}

    def view(self, name: str, step: Step, pool: KVCachePool) -> "LatentView":
        """Return a view over the layer's pages."""
        return LatentView(step, pool.layer(f"{name}.attn"), self.rope_size)

    def decode_view(self, name: str, step: RowStep, pool: KVCachePool) -> LatentDecodeView:
        """Return a view for compiled steps."""
        cache = pool.layer(f"{name}.attn")
        packer = latent_packer(cache, self.q_heads, in_place=step.in_place)
        return LatentDecodeView(step, cache, self.rope_size, packer)


class LatentView(CacheView):
    """A view whose rows are latents in one layer of a pool.

    mlx-lm's modules store ``(latent, rope key)``, compute ``rope query @ rope keys`` themselves and hand those
    scores to the shared attention function as its mask. One row knows nothing of the others' rope keys, so the
    view answers with the identity matrix: the scores come out as the rope query itself, already scaled, and travel
    to ``attend_latent`` in the mask's place. So the modules run unchanged, and what is cached stays latent.

    Args:
        step: Shared by all views of a model.
        layer: The pool's layer.
        rope_size: Width of the rotary part of a key.
    """

    def __init__(self, step: Step, layer: LayerCache, rope_size: int) -> None:
        super().__init__(step, None)
        self._layer = layer
        self._identity = mx.eye(rope_size, dtype=layer.spec.page_dtype)[None, None]
        mx.eval(self._identity)
        self._order_token: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write latents ``[tokens, 1, 1, latent]`` and rope keys; return the latents and the identity."""
        self._order_token = self._layer.write_latent(
            keys[:, 0, 0], values[:, 0, 0], self.step.metadata[self._layer.group]
        )
        identity = self._identity if values.dtype == self._identity.dtype else self._identity.astype(values.dtype)
        super().update_and_fetch(keys, values)
        if self.step.mla_kernel and self.step.metadata[self._layer.group].batch.max_query_len > 1:
            PENDING.ask()
        return keys, identity

    def forget(self) -> None:
        """Let go of the step's rows and of the token that orders its reads after its writes."""
        super().forget()
        self._order_token = None
        PENDING.drop()

    def attend_latent(self, queries: mx.array, rope_scores: mx.array, *, scale: float) -> mx.array:
        """Return attention over the latents of every row's request, projected if the model leaves that to it."""
        out = self._layer.attend_latent(
            queries.squeeze(2),
            rope_scores.squeeze(2) / scale,
            self.step.metadata[self._layer.group],
            scale=scale,
            order_token=self._order_token,
            use_kernel=self.step.mla_kernel,
            projections=PENDING.take(),
        )
        return out[:, :, None]

    def read(self, use: Callable[[mx.array, RaggedBatch], mx.array], like: mx.array) -> mx.array:
        """Return what ``use`` makes of the layer's pages."""
        del like
        return self._layer.read(self.step.metadata[self._layer.group], use, self._order_token)
