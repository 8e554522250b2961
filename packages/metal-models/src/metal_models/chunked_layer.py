"""Layers that attend within chunks of the sequence: a row sees its own chunk up to itself."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from metal_kernels import RaggedBatch
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.pool import KVCachePool
from metal_models.attention_layer import AttentionLayer, NotingView
from metal_models.cache_view import PagedView, Step
from metal_models.decode_views import DecodeView, RowStep, attention_packer
from metal_models.errors import MetalModelsError
from metal_models.layer import Layer
from metal_models.packed_plan import PlanPacker


@dataclass(frozen=True)
class ChunkedLayer(AttentionLayer):
    """An attention layer whose window, the widest that a row sees, is one chunk."""

    def view(self, name: str, step: Step, pool: KVCachePool) -> "ChunkedView":
        """Return a view over the layer's pages."""
        assert self.window is not None
        layer = pool.layer(f"{name}.attn")
        self._check(layer.kv_cache.shape[2])
        return ChunkedView(step, self.window, layer, self.key_size, self.value_size)

    def decode_view(self, name: str, step: RowStep, pool: KVCachePool) -> DecodeView:
        """Return a view for compiled steps."""
        cache = pool.layer(f"{name}.attn")
        self._check(cache.kv_cache.shape[2])
        rows = attention_packer(cache, self.window, self.q_heads, in_place=step.in_place)
        return DecodeView(step, self.window, cache, (self.key_size, self.value_size), ChunkPacker(**vars(rows)))

    def _check(self, block_size: int) -> None:
        assert self.window is not None
        if self.window % block_size:
            raise MetalModelsError(
                f"[load] expected a block size that divides the attention chunk of {self.window} tokens, got "
                f"{block_size}. Choose such a block size (VLLM_METAL_BLOCK_SIZE)."
            )


@dataclass(frozen=True)
class ChunkPacker(PlanPacker):
    """Packs rows that see their own chunk; its size is the window."""

    def seen(self, batch: RaggedBatch) -> RaggedBatch:
        """Return the requests, each with the keys of its last chunk."""
        assert self.window is not None
        return _by_chunk(batch, self.window, self.block_size)


class NotingChunks(NotingView):
    """Takes notes in place of a ``ChunkedKVCache``."""

    def note(self) -> Layer:
        """Return what was seen."""
        noted = super().note()
        if type(noted) is not AttentionLayer:
            return noted
        return ChunkedLayer(**vars(noted))


class ChunkedView(PagedView):
    """A view in which every chunk of a request that a step touches is a request of its own.

    Chunks start at block boundaries, so a chunk's blocks are a piece of its request's block table.
    """

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: object = None,
        soft_cap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return attention over the chunk of every row."""
        metadata = self.step.metadata[self._layer.group]
        block_size, chunk = self._layer.kv_cache.shape[2], self.window
        assert chunk is not None
        local: AttentionMetadata = metadata.batch.once(
            ("chunks", chunk, block_size),
            lambda: replace(metadata, batch=_by_chunk(metadata.batch, chunk, block_size)),
        )
        return self._attend(queries, local, None, scale=scale, soft_cap=soft_cap, sinks=sinks)


def _by_chunk(batch: RaggedBatch, chunk: int, block_size: int) -> RaggedBatch:
    """Cut the requests of ``batch`` at multiples of ``chunk`` positions."""
    row_counts, seq_lens, tables = [], [], []
    blocks = chunk // block_size
    for request, end in enumerate(batch.seq_lens.tolist()):
        begin = end - int(batch.query_lens[request])
        for start in range(begin - begin % chunk, end, chunk):
            chunk_end = min(end, start + chunk)
            row_counts.append(chunk_end - max(begin, start))
            seq_lens.append(chunk_end - start)
            table = batch.block_table[request, start // block_size :][:blocks]
            tables.append(np.pad(table, (0, blocks - len(table))))
    return RaggedBatch(
        np.append(0, np.cumsum(row_counts)).astype(np.int32),
        np.array(seq_lens, np.int32),
        np.array(tables, np.int32).reshape(len(tables), blocks),
    )
