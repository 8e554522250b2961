"""The states that a layer's last step left, until somebody else wants their pages."""

from collections.abc import Collection, Sequence

import mlx.core as mx

from metal_kv.recurrent_state import movable_pages, write_states
from metal_kv.spec import RecurrentStateSpec


class WaitingStates:
    """States of one recurrent layer in arrays of their own instead of in their pages.

    The next step most often continues the very states that this one leaves. On a CPU copying each of them to its page
    and back takes longer than a short convolution. So they wait here, and go to their pages when a step leaves them
    out, or when something else is to be written there.

    Args:
        spec: Of the layer.
        num_blocks: Pages of its slab.

    Attributes:
        block_ids: Where the states belong, in the order of their rows.
        view_shape: Of the slab, as states are written to it.
        view_dtype: Of the same.
    """

    def __init__(self, spec: RecurrentStateSpec, num_blocks: int) -> None:
        self._spec = spec
        self.block_ids: list[int] = []
        self._known: set[int] = set()
        self._states: list[mx.array] = []
        self.view_shape, self.view_dtype = movable_pages(num_blocks, spec.page_size_bytes)

    @property
    def arrays(self) -> Sequence[mx.array]:
        """What is to be evaluated with a step."""
        return self._states

    def wait_for(self, block_ids: Collection[int] | None) -> bool:
        """Tell whether a state belongs to one of some blocks; None for any."""
        return bool(self.block_ids) if block_ids is None else not self._known.isdisjoint(block_ids)

    def beside(self, block_ids: Collection[int]) -> list[int]:
        """Return the blocks of the states that belong to none of some blocks."""
        return [block for block in self.block_ids if block not in block_ids]

    def read(self, block_ids: Sequence[int]) -> tuple[mx.array, ...] | None:
        """Return the states of some blocks, ``[states, *shape]`` each; None if one of them is not here."""
        if block_ids == self.block_ids:
            return tuple(self._states)
        if not self.block_ids or not self._known.issuperset(block_ids):
            return None
        return tuple(self._rows(block_ids))

    def replace(self, block_ids: Sequence[int], states: Sequence[mx.array]) -> None:
        """Let other states wait; what waited is dropped."""
        self.block_ids, self._known = list(block_ids), set(block_ids)
        self._states = [
            mx.contiguous(state if state.dtype == dtype else state.astype(dtype))
            for state, dtype in zip(states, self._spec.dtypes, strict=True)
        ]

    def drop(self) -> None:
        """Forget the states."""
        self.block_ids, self._known, self._states = [], set(), []

    def write(self, pages: mx.array, block_ids: Sequence[int]) -> mx.array:
        """Return pages that hold the states of some blocks; the others are left as they are."""
        states = self._states if list(block_ids) == self.block_ids else self._rows(block_ids)
        return write_states(pages, mx.array(list(block_ids), mx.int32), self._spec, states)[0]

    def _rows(self, block_ids: Sequence[int]) -> list[mx.array]:
        """Return rows of the states: a view where they follow one another."""
        rows = [self.block_ids.index(block) for block in block_ids]
        first, last = rows[0], rows[-1] + 1
        if rows == list(range(first, last)):
            return [state[first:last] for state in self._states]
        return [state[mx.array(rows)] for state in self._states]
