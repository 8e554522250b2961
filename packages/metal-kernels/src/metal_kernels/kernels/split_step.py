"""The requests of a step that have one row, apart from the others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels.decode_plan import DecodePlan, plan_decode
from metal_kernels.kernels.dispatch import Accepted, Rejected
from metal_kernels.ragged import RaggedBatch


class _Variant(Protocol):
    @property
    def parts(self) -> int: ...

    @property
    def simdgroups(self) -> int: ...


_V = TypeVar("_V", bound=_Variant)


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

    def of_others(self, rows: mx.array) -> mx.array:
        """Return the rows of ``others``: the array itself, not a view, if they are all."""
        all_rows = slice(0, rows.shape[0])
        return rows if isinstance(self.other_rows, slice) and self.other_rows == all_rows else rows[self.other_rows]

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


def attend_split(
    query: mx.array,
    batch: RaggedBatch,
    kv_heads: int,
    sliding_window: int | None,
    decode: Accepted[_V] | Rejected,
    attend_singles: Callable[[DecodePlan, _V], mx.array],
    attend_others: Callable[[SplitStep, RaggedBatch], mx.array],
) -> mx.array:
    """Attend the one-row requests of a step and the others apart, and return all rows in order.

    Args:
        query: Rows of the step.
        batch: The step.
        kv_heads: Heads of keys and values.
        sliding_window: Keys a row sees at most.
        decode: What serves the one-row requests; if nothing does, they count as others.
        attend_singles: Attends those of a plan.
        attend_others: Attends the others of a split step, which are a batch of their own.
    """
    if batch.num_tokens == 0:
        return query
    split = split_step(batch, isinstance(decode, Accepted))
    outputs = []
    if isinstance(decode, Accepted) and split.singles.size:
        per_range = kv_heads * decode.variant.parts * decode.variant.simdgroups
        plan = batch.once(
            ("decode plan", sliding_window, per_range),
            lambda: plan_decode(batch, split.singles, sliding_window, per_range),
        )
        outputs.append(attend_singles(plan, decode.variant))
    if split.others is not None:
        outputs.append(attend_others(split, split.others))
    return split.join(outputs)
