"""Blocks that a step's states are read from, and those that they go to."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.recurrent_state import state_blocks
from metal_models.step_rows import Packer, StepRows

_MIN_SLOTS = 4  # two blocks each: MLX passes fewer than 8 numbers as constant memory


@dataclass(frozen=True)
class StatePacker(Packer):
    """Packs what layers need whose states lie in the same blocks.

    Attributes:
        group: The cache group.
        block_size: Tokens per block.
        nowhere: Where states of padding go.
    """

    group: int
    block_size: int
    nowhere: int = 0

    def pack(self, metadata: Sequence[AttentionMetadata], reqs: int) -> tuple[Hashable, Int32[np.ndarray, "elements"]]:
        """Return no sizes; the blocks that states are read from, then those that they go to."""
        batch = metadata[self.group].batch
        blocks = state_blocks(batch, self.block_size)
        packed = np.zeros((2, max(_MIN_SLOTS, reqs)), np.int32)
        packed[1] = self.nowhere
        packed[0, : batch.num_reqs], packed[1, : batch.num_reqs] = blocks.before, blocks.after
        return None, packed.reshape(-1)

    def before_and_after(self, step: StepRows) -> tuple[Int32[mx.array, "reqs"], Int32[mx.array, "reqs"]]:
        """Return the blocks of each request of the step, padding included."""
        (_, packed), reqs = step.parts[self], step.positions.size
        half = packed.size // 2
        return packed[:reqs], packed[half : half + reqs]
