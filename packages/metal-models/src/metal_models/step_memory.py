"""Memory that the host fills and compiled steps read, and the sizes that steps are padded to."""

from collections import deque

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

MIN_ELEMENTS = 8
"""MLX puts smaller inputs in another Metal address space."""

BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Requests that a step is padded to."""

_IN_FLIGHT = 4  # steps that may be under way at once without waiting for one


def bucket(reqs: int) -> int:
    """Return the number of requests that a step of ``reqs`` is padded to."""
    return next(size for size in BUCKETS if size >= reqs)


class Slot:
    """Memory that the host fills and a step reads.

    Attributes:
        array: As the device sees it.
        reader: What the last step that reads it computes; to be set.
    """

    def __init__(self, size: int) -> None:
        self.array = mx.zeros(size, mx.int32)
        mx.eval(self.array)
        self.view = np.array(self.array, copy=False)
        self.reader: mx.array | None = None


class StepMemory:
    """Slots that are used again and again.

    MLX would give a dropped array's memory to a later result on the device, and move its pages between host and
    device each time.
    """

    def __init__(self) -> None:
        self._rings: dict[int, deque[Slot]] = {}

    def filled(self, packed: Int32[np.ndarray, "elements"]) -> Slot:
        """Return a slot that holds ``packed`` and that no step in flight reads."""
        slot = self._free(packed.size)
        slot.view[:] = packed
        return slot

    def _free(self, size: int) -> Slot:
        ring = self._rings.setdefault(size, deque())
        if len(ring) < _IN_FLIGHT:
            ring.append(Slot(size))
            return ring[-1]
        ring.rotate(-1)
        slot = ring[-1]
        if slot.reader is not None:
            mx.eval(slot.reader)
        return slot
