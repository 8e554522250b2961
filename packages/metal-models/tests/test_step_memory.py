"""Memory that the host fills and compiled steps read."""

import mlx.core as mx
import numpy as np
import pytest

from metal_models.step_memory import StepMemory, bucket, on_device


@pytest.mark.parametrize("size", [8, 100, 1_000_000])
def test_slots_hold_what_they_were_filled_with(size):
    memory, filled = StepMemory(), []
    for step in range(4):
        packed = np.arange(size, dtype=np.int32) + step
        slot = memory.filled(packed)
        slot.reader = on_device(slot.array).sum()
        filled.append((slot, packed))
    for slot, packed in filled:
        np.testing.assert_array_equal(np.array(slot.array), packed)


def test_memory_is_used_again_once_its_step_is_done():
    memory = StepMemory()
    slots = []
    for step in range(12):
        slot = memory.filled(np.full(16, step, np.int32))
        slot.reader = mx.array(step) + 0
        slots.append(slot)
    assert len({id(slot) for slot in slots}) < 12
    np.testing.assert_array_equal(np.array(slots[-1].array), np.full(16, 11))


def test_sizes_do_not_share_memory():
    memory = StepMemory()
    small, large = memory.filled(np.zeros(8, np.int32)), memory.filled(np.ones(24, np.int32))
    np.testing.assert_array_equal(np.array(small.array), np.zeros(8))
    np.testing.assert_array_equal(np.array(large.array), np.ones(24))


def test_steps_are_padded_upwards():
    assert [bucket(reqs) for reqs in (1, 3, 9, 33, 256)] == [1, 4, 12, 40, 256]
