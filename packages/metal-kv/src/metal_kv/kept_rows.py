"""Keys and values of requests that decode, kept beside their pages from step to step on a CPU."""

from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Float

from metal_kernels import RaggedBatch

_SPARE = 64  # rows that are appended before all are gathered again
_LEAST_BYTES = 64 << 20
_PART_OF_POOL = 16
_MOST_PADDING = 1.25  # times the rows


class DecodeRuns:
    """Tells the layers of one cache group whether a step goes on where the last one stopped.

    Such a step has the same requests, in the same blocks, each one token longer: then what a layer has read from its
    pages for the last step is what it would read now, but for the rows in between, which the step itself writes.

    Gathering keys and values from pages takes longer than attention over them. What is kept instead takes at most a
    sixteenth of the pool's bytes, or 64 MB where that is more; steps of more rows are gathered.

    Args:
        row_bytes: What a token takes in all layers of the pool that may keep rows.
        pool_bytes: Of the pool.
    """

    def __init__(self, row_bytes: int, pool_bytes: int) -> None:
        self._most_rows = max(_LEAST_BYTES, pool_bytes // _PART_OF_POOL) // max(1, row_bytes)
        self._run = self._index = 0
        self._seq_lens: np.ndarray | None = None
        self._table = np.zeros((0, 0), np.int32)

    def forget(self, block_ids: Collection[int] | None = None) -> None:
        """Let the next step be the first of a run: something else than a step has written some blocks.

        Args:
            block_ids: The blocks; None for any. Where the last step has none of them, nothing is forgotten.
        """
        if block_ids is None or np.isin(self._table, list(block_ids)).any():
            self._seq_lens = None

    def at(self, batch: RaggedBatch) -> tuple[int, int] | None:
        """Return the run that a step belongs to and how many steps of it came before; None for no run.

        To be asked for every step that writes, in order.
        """
        return batch.once(("decode run", id(self)), lambda: self._advance(batch))

    def _advance(self, batch: RaggedBatch) -> tuple[int, int] | None:
        continues = self._continues(batch)
        if not batch.one_row_each or not self._fits(batch) or not (continues or _alike(batch)):
            self._seq_lens = None
            return None
        if continues:
            self._index += 1
        else:
            self._run, self._index = self._run + 1, 0
        self._seq_lens, self._table = batch.seq_lens, batch.block_table.copy()  # the table may be somebody's own
        return self._run, self._index

    def _fits(self, batch: RaggedBatch) -> bool:
        return 0 < batch.num_reqs * (batch.max_seq_len + _SPARE) <= self._most_rows

    def _continues(self, batch: RaggedBatch) -> bool:
        """Tell whether the step has the last one's requests, judged by where their rows lie."""
        known, table, old = self._seq_lens, batch.block_table, self._table
        if known is None or batch.seq_lens.tobytes() != (known + np.int32(1)).tobytes():
            return False
        if table.tobytes() == old.tobytes():
            return table.shape == old.shape
        if table.shape[1] < old.shape[1]:
            return False
        changed = (table[:, : old.shape[1]] != old) & (old != 0)  # padding may have become blocks
        return not changed.any()


def _alike(batch: RaggedBatch) -> bool:
    """Tell whether the requests' contexts are about equally long."""
    return batch.num_reqs * batch.max_seq_len <= _MOST_PADDING * int(batch.seq_lens.sum())


@dataclass
class KeptRows:
    """Rows of one layer: the last ones of all requests lie in one column, shorter requests begin later.

    Attributes:
        run: The run that they belong to.
        index: The step of the run that they include.
        end: Columns in use.
        keys: ``[requests, kv_heads, columns, head_size]``, float32.
        values: Likewise.
    """

    run: int
    index: int
    end: int
    keys: Float[mx.array, "reqs kv_heads columns head_size"]
    values: Float[mx.array, "reqs kv_heads columns head_size"]

    @classmethod
    def gathered(
        cls,
        kv_cache: Float[mx.array, "blocks 2 block_size kv_heads head_size"],
        batch: RaggedBatch,
        at: tuple[int, int],
    ) -> "KeptRows":
        """Return the rows of a step's requests, read from pages that have the step's own ones already."""
        _, _, block_size, kv_heads, head_size = kv_cache.shape
        rows = batch.once(("kept rows", block_size, kv_heads), lambda: _places(batch, block_size, kv_heads))
        flat = kv_cache.reshape(-1, head_size)
        keys, values = (flat[places].astype(mx.float32) for places in rows)
        return cls(*at, batch.max_seq_len, keys, values)

    def append(
        self,
        key: Float[mx.array, "reqs kv_heads head_size"],
        value: Float[mx.array, "reqs kv_heads head_size"],
        dtype: mx.Dtype,
    ) -> bool:
        """Take the rows of the run's next step, as pages of ``dtype`` hold them; False if there is no room."""
        if self.end == self.keys.shape[2]:
            return False
        column = slice(self.end, self.end + 1)
        self.keys[:, :, column] = key.astype(dtype).astype(mx.float32)[:, :, None]
        self.values[:, :, column] = value.astype(dtype).astype(mx.float32)[:, :, None]
        self.end += 1
        self.index += 1
        return True


def visible(batch: RaggedBatch) -> Bool[mx.array, "reqs 1 1 columns"] | None:
    """Return which columns of a step's kept rows are rows of a request; None for all."""
    return batch.once("visible kept rows", lambda: _visible(batch))


def _visible(batch: RaggedBatch) -> mx.array | None:
    longest = batch.max_seq_len
    if int(batch.seq_lens.min()) == longest:
        return None
    return mx.array((np.arange(longest) >= (longest - batch.seq_lens)[:, None])[:, None, None])


def _places(batch: RaggedBatch, block_size: int, kv_heads: int) -> tuple[mx.array, mx.array]:
    """Return where keys and values of every column are, as rows of the pages; columns without a row are some row."""
    longest = batch.max_seq_len
    positions = np.arange(longest + _SPARE, dtype=np.int32) - (longest - batch.seq_lens)[:, None]
    positions = np.clip(positions, 0, batch.seq_lens[:, None] - 1)
    blocks = batch.block_table[np.arange(batch.num_reqs)[:, None], positions // block_size].astype(np.uint32)
    slots = blocks * np.uint32(2 * block_size) + (positions % block_size).astype(np.uint32)
    keys = slots[:, None] * np.uint32(kv_heads) + np.arange(kv_heads, dtype=np.uint32)[None, :, None]
    return mx.array(keys), mx.array(keys + np.uint32(block_size * kv_heads))
