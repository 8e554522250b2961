"""Memory that the host fills and compiled steps read, and the sizes that steps are padded to."""

from collections import deque

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kernels import keep_with_host, target

MIN_ELEMENTS = 8
"""MLX puts smaller inputs in another Metal address space."""

BUCKETS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Requests that a step is padded to."""

_IN_FLIGHT = 4  # steps that may be under way at once without waiting for one
_ARENA = 1 << 19  # elements: 2 MB, a page of CUDA's managed memory
_ALIGNMENT = 64  # elements


def bucket(reqs: int) -> int:
    """Return the number of requests that a step of ``reqs`` is padded to."""
    return next(size for size in BUCKETS if size >= reqs)


def on_device(packed: Int32[mx.array, "elements"]) -> Int32[mx.array, "elements"]:
    """Return what a slot holds in the device's own memory, for kernels that read it again and again."""
    return packed + 0 if target() == "cuda" else packed


class Slot:
    """Memory that the host fills and a step reads.

    Attributes:
        array: As the device sees it.
        view: As the host sees it.
        reader: What the last step that reads it computes; to be set.
    """

    def __init__(self, array: mx.array, view: np.ndarray) -> None:
        self.array = array
        self.view = view
        self.reader: mx.array | None = None


class _Arena:
    """Pages of memory that stay with the host, and nothing else on them; slots are cut from it one after the other."""

    def __init__(self, size: int) -> None:
        self._array = mx.zeros(max(size, _ARENA), mx.int32)
        mx.eval(self._array)
        self._view = np.array(self._array, copy=False)
        keep_with_host(self._view)
        self._used = 0

    def cut(self, size: int) -> Slot | None:
        """Return a slot of ``size`` elements; None if it does not fit."""
        first, end = self._used, self._used + size
        if end > self._view.size:
            return None
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        array = self._array[first:end]
        mx.eval(array)
        return Slot(array, self._view[first:end])


class StepMemory:
    """Slots that are used again and again.

    MLX would give a dropped array's memory to a later result on the device, and move its pages between host and
    device each time.
    """

    def __init__(self) -> None:
        self._rings: dict[int, deque[Slot]] = {}
        self._arena: _Arena | None = None

    def filled(self, packed: Int32[np.ndarray, "elements"]) -> Slot:
        """Return a slot that holds ``packed`` and that no step in flight reads."""
        slot = self._free(packed.size)
        slot.view[:] = packed
        return slot

    def _free(self, size: int) -> Slot:
        ring = self._rings.setdefault(size, deque())
        if len(ring) < _IN_FLIGHT:
            ring.append(self._cut(size))
            return ring[-1]
        ring.rotate(-1)
        slot = ring[-1]
        if slot.reader is not None:
            mx.eval(slot.reader)
        return slot

    def _cut(self, size: int) -> Slot:
        slot = None if self._arena is None else self._arena.cut(size)
        if slot is None:
            self._arena = _Arena(size)
            slot = self._arena.cut(size)
        assert slot is not None
        return slot
