"""Where recurrent states lie in a pool: which blocks a step reads and writes, and pages as kernels move them."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kernels import RaggedBatch, kernels, reshape_and_cache, target
from metal_kv.errors import BlockTableError
from metal_kv.spec import RecurrentStateSpec

_BEFORE_AND_AFTER = np.array([[2], [1]], np.int32)  # how far before a context's end


class BlockIds:
    """Blocks of some states: what all recurrent layers of a step ask for.

    Args:
        host: Their ids.
        device: The same on the device, where they are there already.
    """

    def __init__(self, host: Int32[np.ndarray, "states"], device: Int32[mx.array, "states"] | None = None) -> None:
        self.ids: list[int] = host.tolist()
        self._host = host
        self._device = device

    @classmethod
    def of(cls, block_ids: "BlockIds | mx.array") -> "BlockIds":
        """Return ids that may be on the device as such an object."""
        return block_ids if isinstance(block_ids, BlockIds) else cls(np.asarray(block_ids), block_ids)

    @property
    def device(self) -> Int32[mx.array, "states"]:
        """The ids on the device."""
        if self._device is None:
            self._device = mx.array(self._host)
        return self._device


@dataclass(frozen=True, eq=False)
class StateBlocks:
    """Blocks of the states of a step's requests.

    A state is kept in the block of the last token that it has seen. So a request whose next token opens a block
    reads one block and writes the next, and the first one keeps the state at its end: the snapshot that a request
    with the same prefix starts from.

    A prompt's rows may run past the end of such a block. If it has been allocated, it gets the state at its end as
    well.

    Attributes:
        before: Where the state lies that a request continues; 0 for one that starts.
        after: Where the state goes that the step leaves.
        inside: Where the state goes that a request has at the end of the last block that its rows leave behind; 0
            for nowhere.
        rows_until: How many of its rows that state has seen; 0 where it goes nowhere.
    """

    before: Int32[np.ndarray, "reqs"]
    after: Int32[np.ndarray, "reqs"]
    inside: Int32[np.ndarray, "reqs"]
    rows_until: Int32[np.ndarray, "reqs"]


def state_blocks(batch: RaggedBatch, block_size: int) -> StateBlocks:
    """Return where the states of a step's requests lie.

    Args:
        batch: The step, with the block table of the states' group.
        block_size: Tokens per block of that group.

    Raises:
        BlockTableError: A state has no block: the null block, or one beyond the table.
    """
    return batch.once(("state blocks", block_size), lambda: _state_blocks(batch, block_size))


def _state_blocks(batch: RaggedBatch, block_size: int) -> StateBlocks:
    if batch.one_row_each and batch.num_reqs and (decoding := _decoding_blocks(batch, block_size)):
        return decoding
    num_computed = batch.seq_lens - batch.query_lens
    before = _blocks_of(batch, num_computed - 1, block_size)
    after = _blocks_of(batch, batch.seq_lens - 1, block_size)
    moving = batch.query_lens > 0
    if (after[moving] == 0).any() or (before[moving & (num_computed > 0)] == 0).any():
        raise BlockTableError(
            f"[state_blocks] expected a block for every state, got none for some request among seq_lens "
            f"{batch.seq_lens.tolist()} with block_size {block_size}. Allocate the blocks of a request before its "
            "step, and keep the block of its last token until the step after."
        )
    ends = np.maximum(batch.seq_lens - 1, 0) // block_size * block_size
    passed = ends > num_computed
    inside = np.where(passed, _blocks_of(batch, ends - 1, block_size), 0).astype(np.int32)
    rows_until = np.where(inside > 0, ends - num_computed, 0).astype(np.int32)
    return StateBlocks(before, after, inside, rows_until)


def _decoding_blocks(batch: RaggedBatch, block_size: int) -> StateBlocks | None:
    """Return the same for one row of each request, if all continue a state that has a block."""
    columns = (batch.seq_lens - _BEFORE_AND_AFTER) // np.int32(block_size)
    if columns.min() < 0 or columns.max() >= batch.block_table.shape[1]:
        return None
    before, after = blocks = batch.block_table[np.arange(batch.num_reqs), columns]
    nowhere = np.zeros(batch.num_reqs, np.int32)
    return StateBlocks(before, after, nowhere, nowhere) if blocks.all() else None


def _blocks_of(batch: RaggedBatch, positions: np.ndarray, block_size: int) -> Int32[np.ndarray, "reqs"]:
    """Return the block of one position of every request; 0 where there is none."""
    columns = positions // block_size
    known = (positions >= 0) & (columns < batch.block_table.shape[1])
    blocks = batch.block_table[np.arange(batch.num_reqs), np.where(known, columns, 0)]
    return np.where(known, blocks, 0).astype(np.int32)


def movable_pages(num_blocks: int, page_size: int) -> tuple[tuple[int, ...], mx.Dtype]:
    """Return the shape and dtype under which kernels move pages of any content: only the bytes count."""
    dtype = mx.float32 if page_size % 8 == 0 else mx.float16
    return (num_blocks, 2, 1, 1, page_size // (2 * dtype.size)), dtype


def read_states(
    pages: Float[mx.array, "blocks 2 1 1 words"],
    block_ids: Int32[mx.array, "states"],
    spec: RecurrentStateSpec,
    order_token: mx.array | None,
) -> tuple[mx.array, ...]:
    """Return the states in some blocks, read after ``order_token``."""
    if kernels.move_states(pages, spec.shapes, spec.dtypes):
        return tuple(kernels.gather_states(pages, block_ids, spec.shapes, spec.dtypes, order_token))
    if target() == "cpu" and not any(nbytes % pages.dtype.size for nbytes in spec.state_bytes):
        return _sliced_states(pages, np.asarray(block_ids).tolist(), spec)
    rows = kernels.gather_blocks(pages, block_ids, order_token) if kernels.move_pages(pages) else pages[block_ids]
    return spec.unpack(rows.reshape(block_ids.size, -1).view(spec.page_dtype))


def write_states(
    pages: Float[mx.array, "blocks 2 1 1 words"],
    block_ids: Int32[mx.array, "states"],
    spec: RecurrentStateSpec,
    states: Sequence[mx.array],
    order_token: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Write states to the start of their pages; return the pages and an order token, as ``reshape_and_cache`` does.

    Args:
        pages: Of the layer, see :func:`movable_pages`.
        block_ids: Blocks, different ones; a state whose block is negative goes nowhere.
        spec: Of the layer.
        states: For each array of a state ``[states, *shape]``.
        order_token: Anything read from the pages before, where the states do not follow from it.
    """
    if kernels.move_states(pages, spec.shapes, spec.dtypes):
        typed = [state.astype(dtype) for state, dtype in zip(states, spec.dtypes, strict=True)]
        return kernels.scatter_states(pages, block_ids, typed, order_token)
    if target() == "cpu" and not any(nbytes % pages.dtype.size for nbytes in spec.state_bytes):
        return _with_states(pages, np.asarray(block_ids).tolist(), spec, states), block_ids
    rows = spec.pack(states).view(pages.dtype).reshape(block_ids.size, 2, 1, -1)
    return reshape_and_cache(rows[:, 0], rows[:, 1], pages, block_ids)


def _sliced_states(pages: mx.array, block_ids: Sequence[int], spec: RecurrentStateSpec) -> tuple[mx.array, ...]:
    """Return states by one copy of each of their arrays."""
    flat, start, states = pages.reshape(pages.shape[0], -1), 0, []
    for shape, dtype, nbytes in zip(spec.shapes, spec.dtypes, spec.state_bytes, strict=True):
        end = start + nbytes // pages.dtype.size
        parts = [flat[block : block + 1, start:end] for block in block_ids]
        part = mx.concatenate(parts) if len(parts) > 1 else mx.contiguous(parts[0])
        states.append(part.view(dtype).reshape(len(parts), *shape))
        start = end
    return tuple(states)


def _with_states(
    pages: mx.array, block_ids: Sequence[int], spec: RecurrentStateSpec, states: Sequence[mx.array]
) -> mx.array:
    """Return pages with states written slice by slice: a scatter takes fifteen times as long on a CPU."""
    flat, start = pages.reshape(pages.shape[0], -1), 0
    for state, dtype, nbytes in zip(states, spec.dtypes, spec.state_bytes, strict=True):
        end = start + nbytes // pages.dtype.size
        rows = mx.contiguous(state.astype(dtype).reshape(len(block_ids), -1)).view(pages.dtype)
        for index, block in enumerate(block_ids):
            if block < 0:
                continue
            flat[block : block + 1, start:end] = rows[index : index + 1]
        start = end
    return flat.reshape(pages.shape)
