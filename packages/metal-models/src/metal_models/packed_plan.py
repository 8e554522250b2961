"""Slots of a step's rows, and the plan that cuts the keys which they see into ranges."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels import DecodePlan, RaggedBatch, pack_decode, target
from metal_kernels.decode_plan import MIN_LATENT_RANGE, MIN_RANGE
from metal_kv.attention_metadata import AttentionMetadata
from metal_models.step_memory import MIN_ELEMENTS
from metal_models.step_rows import Packer, StepRows

# On CUDA the launch that joins two ranges keeps the host busier than it saves the device.
_MIN_RANGE = {"cuda": 512}


@dataclass(frozen=True)
class PlanPacker(Packer):
    """Packs what layers need that attend over rows of the cache.

    Attributes:
        group: The cache group.
        window: Keys that a row sees at most.
        simdgroups_per_range: SIMD-groups that take the same range of keys.
        block_size: Tokens per block.
        latent: Whether the rows are latents.
    """

    group: int
    window: int | None
    simdgroups_per_range: int
    block_size: int
    latent: bool = False

    def pack(self, metadata: Sequence[AttentionMetadata], reqs: int) -> tuple[Hashable, Int32[np.ndarray, "elements"]]:
        """Return the plan's sizes; slots, then the plan."""
        group = metadata[self.group]
        slots = np.full(max(MIN_ELEMENTS, reqs), -1, np.int32)
        slots[: group.batch.num_reqs] = group.slots.host
        min_range = MIN_LATENT_RANGE if self.latent else _MIN_RANGE.get(target(), MIN_RANGE)
        sizes, plan = pack_decode(
            self.seen(group.batch), self.window, self.simdgroups_per_range, reqs, self.block_size, min_range
        )
        return sizes, np.concatenate([slots, plan])

    def seen(self, batch: RaggedBatch) -> RaggedBatch:
        """Return the requests as the layers see them: with all their keys."""
        return batch

    def slots_and_plan(self, step: StepRows) -> tuple[Int32[mx.array, "slots"], DecodePlan]:
        """Return what :meth:`pack` packed, padding included."""
        sizes, packed = step.parts[self]
        slots = max(MIN_ELEMENTS, sizes.reqs)
        plan = step.once(self, lambda: sizes.unpack(packed[slots : slots + sum(sizes.elements)]))
        return packed[:slots], plan

    def most_keys(self, step: StepRows) -> int:
        """Return how many keys requests of the step have at most; those of the same sizes never have more."""
        sizes, _ = step.parts[self]
        return int(sizes.blocks) * self.block_size
