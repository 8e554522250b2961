"""What one layer of an mlx-lm model sees in place of its cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from metal_kernels import RaggedBatch
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.key_value_pages import gather_rows
from metal_kv.layer_cache import LayerCache
from metal_kv.spec import AttentionSpec
from metal_models.errors import MetalModelsError
from metal_models.spans import Spans

OWN_MASK = (
    "[attention] expected the mask that the cache made, got an array. "
    "The model builds its own attention mask, which a paged cache cannot follow."
)


class Step:
    """The rows under way, shared by the views of all layers.

    A model sees every scheduled token as a batch row of length 1, so the batch axis of its
    arrays is the token axis of the step.

    Args:
        mla_kernel: Whether latent attention may use the GPU kernel.
    """

    def __init__(self, mla_kernel: bool = True) -> None:
        self.mla_kernel = mla_kernel
        self.views: list[CacheView] = []
        self.positions = mx.zeros((0,), mx.int32)
        self.metadata: Sequence[AttentionMetadata] = ()
        self.spans = Spans()
        self.plain = False

    def begin(self, metadata: Sequence[AttentionMetadata], spans: Spans | None = None, *, plain: bool = False) -> None:
        """Make ``metadata`` (one per cache group) the rows that the views speak of.

        Args:
            metadata: Of the step.
            spans: Rows that see each other.
            plain: Whether the rows take nothing but tokens and positions, and no adapters: modules do the same then
                as in every other such step.
        """
        self.plain = plain
        self.metadata = metadata
        self.positions = metadata[0].positions
        self.spans = spans or Spans()

    def end(self) -> None:
        """Drop what the layers left, so that nothing outlives its step."""
        self.metadata = ()
        for view in self.views:
            view.forget()

    def owner(self, keys: mx.array, asked: object) -> "CacheView":
        """Return the view that stored ``keys``: most often ``asked``, else the layer it shares with."""
        if isinstance(asked, CacheView) and asked.keys is keys:
            return asked
        for view in self.views:
            if view.keys is keys:
                return view
        raise MetalModelsError(
            "[attention] expected the keys that a layer's cache returned, got other keys. "
            "The model changes its keys after caching them, which a paged cache cannot follow."
        )


@dataclass(frozen=True, slots=True)
class PagedMask:
    """Stands for an attention mask on its way from ``make_mask`` to the attention call.

    Causality follows from positions, and only the window has to travel. A model that looks inside its mask
    fails on it, and is refused when it is traced; one that masks scores with it before it calls the attention
    function (latent attention does) finds that it hides nothing.
    """

    step: Step
    window: int | None

    def __mlx_array__(self) -> mx.array:
        """Return the mask of a row against itself."""
        return mx.array(True)


class CacheView:
    """mlx-lm's cache protocol over the rows of a step; this base stores nothing.

    Args:
        step: Shared by all views of a model.
        window: How many latest tokens the layer's own cache would keep, or None for all.
    """

    def __init__(self, step: Step, window: int | None) -> None:
        self.step = step
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        step.views.append(self)

    @property
    def offset(self) -> mx.array:
        """Position of every row, int32 ``[tokens]``; rotary embeddings take it as it is."""
        return self.step.positions

    def make_mask(
        self,
        N: int,
        return_array: bool = False,
        window_size: int | None = None,
    ) -> PagedMask | None:
        """Return the stand-in that carries the window to the attention call.

        There is none where an array is asked for without a window: it would hide nothing from a row, and the
        models that ask for one compute with it themselves.
        """
        window = window_size or self.window
        return None if return_array and window is None else PagedMask(self.step, window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store this step's rows ``[tokens, kv_heads, 1, head_size]``; return the same rows."""
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return the rows stored in this step, for layers that share another layer's cache."""
        if self.keys is None or self.values is None:
            raise MetalModelsError("[attention] expected rows stored earlier in this step, got none.")
        return self.keys, self.values

    def forget(self) -> None:
        """Let go of the step's rows."""
        self.keys = self.values = None

    def window_of(self, mask: object) -> int | None:
        """Return the window of a call: what the mask asks for, else what the layer's own cache would keep."""
        asked = mask.window if isinstance(mask, PagedMask) else None
        return asked or self.window

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: object = None,
        soft_cap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return attention of ``queries`` ``[tokens, q_heads, 1, head_size]`` over the cached context."""
        raise NotImplementedError

    def attend_latent(self, queries: mx.array, rope_scores: mx.array, *, scale: float) -> mx.array:
        """Return attention of absorbed queries over cached latents.

        Args:
            queries: ``[tokens, q_heads, 1, latent]``, times the up-projection of keys.
            rope_scores: What the model made of its scaled rope queries and the rope keys that this view returned.
            scale: Factor of the scores of ``queries``.

        Returns:
            ``[tokens, q_heads, 1, latent]``, before the up-projection of values.

        Raises:
            MetalModelsError: The layer keeps no latents, so the array is a mask of the model's own.
        """
        raise MetalModelsError(OWN_MASK)

    def read(self, use: Callable[[mx.array, RaggedBatch], mx.array], like: mx.array) -> mx.array:
        """Return what ``use`` makes of the layer's pages, for attention that no kernel does.

        Args:
            use: Takes pages ``[blocks, *page_shape]`` and the batch whose block table points into them.
            like: An array of the shape and dtype that ``use`` returns, ``[tokens, …]``; never evaluated.
        """
        raise NotImplementedError

    @property
    def max_context(self) -> int:
        """Longest context of the step's requests."""
        return self.step.metadata[0].batch.max_seq_len if self.step.metadata else 0


class PagedView(CacheView):
    """A view whose rows go to, and whose context comes from, one layer of a pool.

    Keys and values of different widths are padded with zeros to the layer's page width, which
    changes neither scores nor the part of the output that is kept.

    Args:
        step: Shared by all views of a model.
        window: How many latest tokens the layer's own cache would keep, or None for all.
        layer: The pool's layer.
        key_size: Width of the model's keys (and queries).
        value_size: Width of the model's values (and outputs).
    """

    def __init__(self, step: Step, window: int | None, layer: LayerCache, key_size: int, value_size: int) -> None:
        super().__init__(step, window)
        self._layer = layer
        self._value_size = value_size
        self._key_padding = max(0, value_size - key_size)
        self._value_padding = max(0, key_size - value_size)
        self._order_token: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write this step's rows to the pool; return them as they came."""
        self._order_token = self._layer.write(
            _rows(keys, self._key_padding),
            _rows(values, self._value_padding),
            self.step.metadata[self._layer.group],
        )
        return super().update_and_fetch(keys, values)

    def forget(self) -> None:
        """Let go of the step's rows and of the token that orders its reads after its writes."""
        super().forget()
        self._order_token = None

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: object = None,
        soft_cap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return attention over the block table of every row's request."""
        metadata = self.step.metadata[self._layer.group]
        return self._attend(queries, metadata, self.window_of(mask), scale=scale, soft_cap=soft_cap, sinks=sinks)

    def _attend(
        self,
        queries: mx.array,
        metadata: AttentionMetadata,
        window: int | None,
        *,
        scale: float,
        soft_cap: float | None,
        sinks: mx.array | None,
    ) -> mx.array:
        rows = _rows(queries, self._key_padding)
        out = self._layer.attend(
            rows,
            metadata,
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            sliding_window=window,
            order_token=self._order_token,
            **self._own_rows(),
        )
        if self.step.spans.concern(window):
            if soft_cap is not None or sinks is not None:
                raise MetalModelsError("[attention] expected spans without soft cap and sinks, got one of them.")
            out = mx.array(out)  # another object for the same values: the layer has noted its own
            out[mx.array(self.step.spans.rows)] = self._attend_spans(rows, metadata, window, scale)
        if self._value_padding:
            out = out[..., : self._value_size]
        return out[:, :, None]

    def _own_rows(self) -> dict[str, mx.array]:
        """Return the rows that this view wrote in the step, as they were written."""
        if self.keys is None or self.values is None or self._key_padding or self._value_padding:
            return {}
        return {"key": _rows(self.keys, 0), "value": _rows(self.values, 0)}

    def _attend_spans(self, rows: mx.array, metadata: AttentionMetadata, window: int | None, scale: float) -> mx.array:
        spans, spec = self.step.spans, self._layer.spec
        assert isinstance(spec, AttentionSpec)

        def attend(pages: mx.array, batch: RaggedBatch) -> mx.array:
            return spans.attend(rows, partial(gather_rows, spec, pages), batch, scale=scale, window=window)

        return self._layer.read(metadata, attend, self._order_token)

    def read(self, use: Callable[[mx.array, RaggedBatch], mx.array], like: mx.array) -> mx.array:
        """Return what ``use`` makes of the layer's pages."""
        del like
        return self._layer.read(self.step.metadata[self._layer.group], use, self._order_token)


def _rows(array: mx.array, padding: int) -> mx.array:
    """Drop the length axis of ``[tokens, heads, 1, size]`` and widen the last axis by ``padding`` zeros."""
    rows = array.squeeze(2)
    return mx.pad(rows, [(0, 0), (0, 0), (0, padding)]) if padding else rows
