"""Which rows of a step belong to which request, and which cache blocks each may read."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels.errors import MetalKernelsError

_Built = TypeVar("_Built")

# MLX puts inputs of fewer elements in another Metal address space, which would be another kernel.
_MIN_DEVICE_ELEMENTS = 8

_COUNT = np.arange(1025, dtype=np.int32)
_ONES = np.ones(1024, np.int32)
_COUNT.flags.writeable = _ONES.flags.writeable = False
_COUNT_BYTES = _COUNT.tobytes()


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """The requests of one step, as host arrays that every layer of the step shares.

    Rows are tokens: request ``r`` owns rows ``query_start_loc[r]`` up to ``query_start_loc[r + 1]``, and
    its row ``i`` sits at position ``seq_lens[r] - query_len[r] + i`` of its sequence. A request may have no row.
    Callers put requests with one row (decodes) first: results do not depend on it, speed does.
    The arrays must not change afterwards: what is derived from them is kept.

    Args:
        query_start_loc: First row of each request, then the number of rows of the step.
        seq_lens: Context length of each request, this step's rows included.
        block_table: Physical block of each logical block, padded on the right with 0. Block 0 is the
            null block: it never holds data.

    Raises:
        MetalKernelsError: The arrays contradict each other.
    """

    query_start_loc: Int32[np.ndarray, "reqs_plus_one"]
    seq_lens: Int32[np.ndarray, "reqs"]
    block_table: Int32[np.ndarray, "reqs max_blocks"]
    _kept: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse arrays that contradict each other."""
        for name, rank in (("query_start_loc", 1), ("seq_lens", 1), ("block_table", 2)):
            array = getattr(self, name)
            if array.dtype != np.int32 or array.ndim != rank:
                raise MetalKernelsError(
                    f"[RaggedBatch] expected {name} to be int32 of rank {rank}, got {array.dtype} of shape "
                    f"{array.shape}. Convert it with numpy before building the batch."
                )
        reqs = len(self.seq_lens)
        if len(self.query_start_loc) != reqs + 1 or len(self.block_table) != reqs:
            raise MetalKernelsError(
                f"[RaggedBatch] expected {reqs + 1} row starts and {reqs} block table rows for {reqs} requests, "
                f"got {len(self.query_start_loc)} and {len(self.block_table)}. Slice the arrays to the batch."
            )
        if self.one_row_each:
            self.__dict__["query_lens"] = _ONES[:reqs]
        if self.query_start_loc[0] != 0 or (not self.one_row_each and self.query_lens.min(initial=0) < 0):
            raise MetalKernelsError(
                "[RaggedBatch] expected query_start_loc to start at 0 and never fall, got "
                f"{self.query_start_loc.tolist()}. Build it as a running sum of rows per request."
            )
        fewest = 1 if self.one_row_each else self.query_lens
        if (self.seq_lens < fewest).any():
            raise MetalKernelsError(
                f"[RaggedBatch] expected seq_lens to include the step's rows ({self.query_lens.tolist()}), got "
                f"{self.seq_lens.tolist()}. Add the scheduled tokens to the computed ones."
            )

    @cached_property
    def one_row_each(self) -> bool:
        """Whether every request has exactly one row: a step that only decodes."""
        starts = self.query_start_loc
        return len(starts) <= len(_COUNT) and starts.tobytes() == _COUNT_BYTES[: starts.nbytes]

    @cached_property
    def query_lens(self) -> Int32[np.ndarray, "reqs"]:
        """Rows of each request in this step."""
        lens: np.ndarray = self.query_start_loc[1:] - self.query_start_loc[:-1]
        return lens

    @cached_property
    def num_reqs(self) -> int:
        """Number of requests, those without a row included."""
        return len(self.seq_lens)

    @cached_property
    def num_tokens(self) -> int:
        """Number of rows of the step."""
        return int(self.query_start_loc[-1])

    @cached_property
    def num_decodes(self) -> int:
        """Number of leading requests that have exactly one row."""
        if self.one_row_each:
            return self.num_reqs
        others = np.flatnonzero(self.query_lens != 1)
        return int(others[0]) if others.size else self.num_reqs

    @cached_property
    def max_query_len(self) -> int:
        """Most rows of any request; 0 without requests."""
        if self.one_row_each:
            return min(1, self.num_reqs)
        return int(self.query_lens.max(initial=0))

    @cached_property
    def max_seq_len(self) -> int:
        """Longest context of any request; 0 without requests."""
        return int(self.seq_lens.max(initial=0))

    def with_blocks(self, block_table: Int32[np.ndarray, "reqs max_blocks"]) -> "RaggedBatch":
        """Return the same rows over other blocks: those of another cache group.

        Raises:
            MetalKernelsError: The table does not fit the batch.
        """
        if block_table.dtype != np.int32 or block_table.ndim != 2 or len(block_table) != self.num_reqs:
            raise MetalKernelsError(
                f"[RaggedBatch.with_blocks] expected an int32 table of {self.num_reqs} rows, got {block_table.dtype} "
                f"of shape {block_table.shape}. Slice the table to the batch."
            )
        other: RaggedBatch = object.__new__(type(self))
        other.__dict__.update(self.__dict__, block_table=block_table, _kept={})  # what is known of the rows stays
        return other

    def on_device(self, name: str) -> Int32[mx.array, "..."]:
        """Return the device twin of the array field ``name``, made on first use.

        Twins are flat in row-major order and zero-padded to at least eight elements, so that one compiled
        kernel serves every batch size.
        """
        host: np.ndarray = getattr(self, name)
        return self.once(("on_device", name), lambda: device_array(host))

    def once(self, key: Hashable, build: Callable[[], _Built]) -> _Built:
        """Return what ``build()`` gave the first time ``key`` was asked for: work shared by all layers."""
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]  # type: ignore[return-value]


def device_array(host: np.ndarray) -> Int32[mx.array, "elements"]:
    """Copy ``host`` to the device: flat, int32, zero-padded to at least eight elements."""
    flat = host.astype(np.int32, copy=False).ravel()
    missing = max(0, _MIN_DEVICE_ELEMENTS - flat.size)
    return mx.array(np.pad(flat, (0, missing)) if missing else flat)
