"""Mixers that attend over rows of the cache: a slot for each row, and a plan that cuts keys into ranges."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels import DecodePlan, pack_decode
from metal_kv.attention_metadata import AttentionMetadata
from metal_models.step_memory import MIN_ELEMENTS
from metal_models.token_mixer import BoundMixer, StepRows


@dataclass(frozen=True)
class PlanKey:
    """What layers that share slots and plan have in common.

    Attributes:
        group: The cache group.
        window: Keys that a row sees at most.
        simdgroups_per_range: SIMD-groups that take the same range of keys.
        block_size: Tokens per block.
        min_range: Keys of a range at least.
    """

    group: int
    window: int | None
    simdgroups_per_range: int
    block_size: int
    min_range: int


class PlannedMixer(BoundMixer):
    """A mixer that shares slots and plan with those of an equal key."""

    key: PlanKey

    def pack(self, metadata: Sequence[AttentionMetadata], reqs: int) -> tuple[Hashable, Int32[np.ndarray, "elements"]]:
        """Return the plan's sizes; slots, then the plan."""
        key = self.key
        group = metadata[key.group]
        slots = np.full(max(MIN_ELEMENTS, reqs), -1, np.int32)
        slots[: group.batch.num_reqs] = group.slots.host
        sizes, plan = pack_decode(
            group.batch, key.window, key.simdgroups_per_range, reqs, key.block_size, key.min_range
        )
        return sizes, np.concatenate([slots, plan])

    def slots_and_plan(self, step: StepRows, tokens: int) -> tuple[Int32[mx.array, "slots"], DecodePlan]:
        """Return what :meth:`pack` packed for a step of ``tokens`` rows, padding included."""
        sizes, packed = step.parts[self.key]
        slots = max(MIN_ELEMENTS, tokens)
        plan = step.once(self.key, lambda: sizes.unpack(packed[slots : slots + sum(sizes.elements)]))
        return packed[:slots], plan
