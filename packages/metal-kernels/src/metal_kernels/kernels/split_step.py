"""The requests of a step that have one row, apart from the others."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels.ragged import RaggedBatch


@dataclass(frozen=True, eq=False)
class SplitStep:
    """A step's requests by their number of rows.

    Attributes:
        singles: Requests with one row.
        others: Requests with more rows, as a batch of their own; None if there are none.
        other_rows: Rows of ``others`` in the step; a slice where they are consecutive.
        restore: Puts the rows of ``singles``, then of ``others``, back in order; None if they are.
    """

    singles: Int32[np.ndarray, "singles"]
    others: RaggedBatch | None
    other_rows: slice | mx.array
    restore: mx.array | None

    def join(self, outputs: list[mx.array]) -> mx.array:
        """Return the step's rows, from those of ``singles`` and those of ``others``."""
        joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        return joined if self.restore is None else joined[self.restore]


def split_step(batch: RaggedBatch, single_rows: bool) -> SplitStep:
    """Split ``batch``, once for all layers; without ``single_rows`` all requests with rows are others."""
    return batch.once(("split step", single_rows), lambda: _split(batch, single_rows))


def _split(batch: RaggedBatch, single_rows: bool) -> SplitStep:
    one = batch.query_lens == 1
    singles = np.flatnonzero(one & single_rows).astype(np.int32)
    others = np.flatnonzero(batch.query_lens > (1 if single_rows else 0))
    starts = batch.query_start_loc
    rows = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in others] or [np.zeros(0)]).astype(np.int32)
    own = None
    if others.size:
        ends = np.append(0, np.cumsum(batch.query_lens[others])).astype(np.int32)
        own = RaggedBatch(ends, batch.seq_lens[others], batch.block_table[others])
    consecutive = rows.size and len(rows) == int(rows[-1] - rows[0]) + 1
    order = np.concatenate([starts[singles], rows])
    return SplitStep(
        singles,
        own,
        slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else mx.array(rows),
        None if (np.diff(order) == 1).all() else mx.array(np.argsort(order).astype(np.uint32)),
    )
