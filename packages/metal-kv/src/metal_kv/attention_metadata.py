"""What attention and cache writes of one step need to know, for one cache group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels import RaggedBatch
from metal_kv.block_table import kernel_block_table
from metal_kv.errors import SpecError
from metal_kv.slot_mapping import decode_slot_mapping, slot_mapping, token_positions


class StepArray:
    """Numbers of a step that the host has, and the device once they are asked for there.

    Args:
        host: The numbers; not changed afterwards.
        device: The same on the device, where another array of the step already has them.
    """

    def __init__(self, host: Int32[np.ndarray, "tokens"], device: Int32[mx.array, "tokens"] | None = None) -> None:
        self.host = host
        if device is not None:
            self.__dict__["device"] = device

    @cached_property
    def device(self) -> Int32[mx.array, "tokens"]:
        """The numbers on the device."""
        return mx.array(self.host)


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """The rows of a step, where they are written and what they may read, for the layers of one cache group.

    Attributes:
        batch: Requests, context lengths and block table of the step, in kernel blocks.
        slots: Cache slot each row is written to; -1 for none.
        places: Position of every row in its own sequence.
    """

    batch: RaggedBatch
    slots: StepArray
    places: StepArray

    @classmethod
    def build(
        cls,
        query_start_loc: Sequence[int] | np.ndarray,
        seq_lens: Sequence[int] | np.ndarray,
        block_table: Int32[np.ndarray, "reqs max_blocks"],
        block_size: int,
        positions: Int32[mx.array, "tokens"] | None = None,
        *,
        kernel_block_size: int | None = None,
        keeps_rows: bool = True,
        like: "AttentionMetadata | None" = None,
    ) -> "AttentionMetadata":
        """Build the metadata of a step on the host.

        Args:
            query_start_loc: First row of every request, then the number of rows.
            seq_lens: Context length of every request, the step's rows included.
            block_table: Allocated block ids per request, padded on the right with 0. It is kept, not copied,
                unless kernel blocks are smaller: evaluate or finish the step before changing it.
            block_size: Tokens per allocated block.
            positions: The step's positions when another group already has them.
            kernel_block_size: Tokens per block as kernels see them; None for ``block_size``.
            keeps_rows: False for a group of recurrent layers, which write no rows: every slot is -1.
            like: The same step as another group sees it: its rows and positions are taken from there, unchecked.

        Raises:
            BlockTableError: A row lies beyond the request's blocks.
            SpecError: ``kernel_block_size`` does not divide ``block_size``.
        """
        kernel_block_size = kernel_block_size or block_size
        if block_size % kernel_block_size:
            raise SpecError(
                f"[AttentionMetadata.build] expected a kernel_block_size that divides {block_size}, "
                f"got {kernel_block_size}. Use the kernel block size of the group."
            )
        table = kernel_block_table(block_table, block_size // kernel_block_size)
        if like is not None:
            batch, places = like.batch.with_blocks(table), like.places
        else:
            starts, lens = np.asarray(query_start_loc, np.int32), np.asarray(seq_lens, np.int32)
            batch = RaggedBatch(query_start_loc=starts, seq_lens=lens, block_table=table)
            rows_at = lens - np.int32(1) if batch.one_row_each else token_positions(starts, lens)
            places = StepArray(rows_at, positions)
        if keeps_rows and batch.one_row_each:
            slots = decode_slot_mapping(places.host, block_table, block_size)
        elif keeps_rows:
            slots = slot_mapping(batch.query_start_loc, places.host, block_table, block_size)
        else:
            slots = np.full(len(places.host), -1, np.int32)
        return cls(batch, StepArray(slots), places)

    def at(self, positions: Int32[np.ndarray, "tokens"]) -> "AttentionMetadata":
        """Return the same rows at other positions."""
        return replace(self, places=StepArray(positions))

    @property
    def slot_mapping(self) -> Int32[mx.array, "tokens"]:
        """Cache slot each row is written to, on the device."""
        return self.slots.device

    @property
    def positions(self) -> Int32[mx.array, "tokens"]:
        """Position of every row in its own sequence, on the device; groups of a step share one array."""
        return self.places.device

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return len(self.slots.host)
