"""One allocation of cache pages, which layers of several groups may share."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import mlx.core as mx

from metal_kernels import target
from metal_kv.waiting_states import WaitingStates

_Result = TypeVar("_Result")
_MOST_BYTES_HELD = 1 << 16


class Slab:
    """One allocation of pages: the only owner of its array.

    MLX writes an array in place only if nothing else refers to it once the write is evaluated. So the
    slab keeps the newest array only, and on CPU, where layers of several groups take turns on one slab
    within a step, it evaluates the reads of the one before it lets the next one write.
    """

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype, *, shared: bool) -> None:
        self.array = mx.zeros(shape, dtype)
        self.waiting: list[WaitingStates] = []
        """States of its layers that are newer than what their pages hold."""
        self._shared = shared and target() == "cpu"
        self._reads: list[mx.array] = []
        self.state_token: mx.array | None = None
        """Of the last write in place whose reader is in a later step."""

    def view(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return the array as some layer sees it."""
        return _view(self.array, shape, dtype)

    def rewrite(
        self,
        shape: tuple[int, ...],
        dtype: mx.Dtype,
        write: Callable[[mx.array], tuple[mx.array, _Result]],
        *,
        blocks: Collection[int] | None = None,
    ) -> _Result:
        """Replace the array by the first thing that ``write`` makes of its view; return the second.

        Args:
            shape: Of the view.
            dtype: Of the view.
            write: Takes the view and keeps no reference to it.
            blocks: The blocks that are written, so that states of others may wait on; None for any.
        """
        self.settle(blocks)
        return self._replace(shape, dtype, write)

    def settle(self, blocks: Collection[int] | None = None) -> None:
        """Bring states to their pages, of each layer that has some waiting for one of ``blocks``; None for any."""
        for states in self.waiting:
            if states.wait_for(blocks):
                self.write_waiting(states, states.block_ids)
                states.drop()

    def write_waiting(self, states: WaitingStates, block_ids: Sequence[int]) -> None:
        """Write some of the states that wait to their pages; they wait on."""
        self._replace(states.view_shape, states.view_dtype, lambda pages: (states.write(pages, block_ids), None))

    def _replace(
        self, shape: tuple[int, ...], dtype: mx.Dtype, write: Callable[[mx.array], tuple[mx.array, _Result]]
    ) -> _Result:
        if self._reads:
            mx.eval(self._reads)
            self._reads.clear()
        self.array, result = write(self.view(shape, dtype))
        return result

    def note_read(self, output: mx.array) -> None:
        """Remember that ``output`` reads the array: a large one by a scalar with a buffer of its own."""
        if self._shared and output.size:
            small = output.nbytes <= _MOST_BYTES_HELD
            self._reads.append(output if small else output[0, 0].astype(mx.float32).sum())

    def note_copies(self, copies: Sequence[mx.array]) -> None:
        """Remember that ``copies`` are taken from the array, which is rewritten in the same step."""
        if target() == "cpu":
            self._reads.extend(copies)

    def pending(self) -> list[mx.array]:
        """Arrays to evaluate so that everything built so far on this slab is done."""
        tokens = [] if self.state_token is None else [self.state_token]
        waiting = [array for states in self.waiting for array in states.arrays]
        return [self.array, *self._reads, *tokens, *waiting]

    def clear(self) -> None:
        """Set every page to zero."""
        shape, dtype = self.array.shape, self.array.dtype
        self._reads.clear()
        self.state_token = None
        for states in self.waiting:
            states.drop()
        del self.array  # first: never two of them
        self.array = mx.zeros(shape, dtype)
        mx.eval(self.array)

    def keep_state_token(self, order_token: mx.array) -> None:
        """Keep what orders the next step's reads after this write, where writes are in place."""
        if target() != "cpu":
            self.state_token = order_token


def _view(array: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Reinterpret a contiguous array whose first axis counts pages; lazy, no copy, donatable."""
    if array.dtype != dtype:
        array = array.reshape(array.shape[0], -1).view(dtype)
    return array if array.shape == shape else array.reshape(shape)
