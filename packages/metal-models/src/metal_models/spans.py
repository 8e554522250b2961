"""Attention among rows that see each other, later ones too: the embeddings of one image in some models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metal_kernels import RaggedBatch
from metal_models.errors import MetalModelsError

# Models whose spans are causal in layers without a window.
_WINDOWS_ONLY = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}


@dataclass(frozen=True)
class Spans:
    """Rows of a step that see each other.

    Attributes:
        ranges: First row of each span and the row after its last; a span lies within one request.
        windows_only: Whether they do so only in layers with a sliding window.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    windows_only: bool = False

    @classmethod
    def of(cls, ranges: Sequence[tuple[int, int]], architecture: str) -> "Spans":
        """Return spans as a model has them."""
        return cls(tuple(ranges), architecture in _WINDOWS_ONLY)

    def concern(self, window: int | None) -> bool:
        """Whether a layer that reads so many latest tokens computes anything else for them."""
        return bool(self.ranges) and (window is not None or not self.windows_only)

    @property
    def rows(self) -> np.ndarray:
        """All rows, int32."""
        return np.concatenate([np.arange(first, end, dtype=np.int32) for first, end in self.ranges])

    def attend(
        self,
        queries: mx.array,
        gather: Callable[[mx.array, int], tuple[mx.array, mx.array]],
        batch: RaggedBatch,
        *,
        scale: float,
        window: int | None,
    ) -> mx.array:
        """Return the attention of all ``rows``, ``[rows, q_heads, head_size]``.

        A row sees what is before it and all of its span, but nothing that is further back than the window.

        Args:
            queries: Of all rows of the step, ``[tokens, q_heads, head_size]``.
            gather: Takes a request's block table and a length; returns keys and values from position 0 up to there,
                each ``[context, kv_heads, head_size]``, the step's own among them.
            batch: Whose rows they are.
            scale: Factor of the scores.
            window: Positions a row sees up to its own; None for all.
        """
        return mx.concatenate(
            [self._attend(span, queries, gather, batch, scale, window) for span in self.ranges], axis=0
        )

    def _attend(
        self,
        span: tuple[int, int],
        queries: mx.array,
        gather: Callable[[mx.array, int], tuple[mx.array, mx.array]],
        batch: RaggedBatch,
        scale: float,
        window: int | None,
    ) -> mx.array:
        first, end = span
        request = int(np.searchsorted(batch.query_start_loc, first, side="right")) - 1
        after = int(batch.query_start_loc[request + 1])
        if not 0 <= first < end <= after:
            raise MetalModelsError(
                f"[forward] expected spans within the rows of one request, got {first} to {end} where a request ends "
                f"at {after}. Give the rows of whole items."
            )
        shift = int(batch.seq_lens[request]) - after  # from row to position
        keys, values = gather(mx.array(batch.block_table[request]), end + shift)
        begin = 0 if window is None else max(0, first + shift - window + 1)
        mask = None
        if window is not None:
            positions = np.arange(first, end)[:, None] + shift
            mask = mx.array(np.arange(begin, end + shift)[None] > positions - window)
        q, k, v = (
            array.swapaxes(0, 1)[None].astype(queries.dtype)
            for array in (queries[first:end], keys[begin:], values[begin:])
        )
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)[0].swapaxes(0, 1)
