"""Runs a module that needs sequences on a step of token rows, and keeps its states in a pool."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache

from metal_kernels import RaggedBatch
from metal_kv.layer_cache import LayerCache
from metal_kv.recurrent_state import StateBlocks, state_blocks
from metal_models.cache_view import Step
from metal_models.errors import MetalModelsError


@dataclass(frozen=True)
class SequenceRun:
    """Neighbouring requests of a step that are computed alike: one batch ``[requests, length]``.

    Attributes:
        requests: Their places in the step.
        rows: Their rows.
        length: Rows of each.
        fresh: Whether they start here; else all continue a state.
        kept_after: After how many rows the state is kept as well; 0 for none.
    """

    requests: slice
    rows: slice
    length: int
    fresh: bool
    kept_after: int


@dataclass(frozen=True)
class StateRuns:
    """A step as a recurrent layer computes it.

    Attributes:
        runs: In row order: all decode rows are one, every piece of a prompt most often its own.
        before: For each run the blocks of the states that it continues.
        after: Blocks of the states that the runs leave, run by run: first those that are kept, then the last ones.
    """

    runs: tuple[SequenceRun, ...]
    before: tuple[mx.array, ...]
    after: mx.array


def state_runs(batch: RaggedBatch, block_size: int) -> StateRuns:
    """Cut a step into runs for layers whose states lie in blocks of ``block_size`` tokens."""
    return batch.once(("state runs", block_size), lambda: _state_runs(batch, state_blocks(batch, block_size)))


def _state_runs(batch: RaggedBatch, blocks: StateBlocks) -> StateRuns:
    runs = tuple(_runs(batch, blocks.rows_until))
    after = []
    for run in runs:
        kept = [blocks.inside[run.requests]] if run.kept_after else []
        after += [*kept, blocks.after[run.requests]]
    before = tuple(mx.array(blocks.before[run.requests]) for run in runs)
    return StateRuns(runs, before, mx.array(np.concatenate(after)))


def _runs(batch: RaggedBatch, rows_until: np.ndarray) -> Iterator[SequenceRun]:
    lengths, fresh = batch.query_lens, batch.seq_lens == batch.query_lens
    changes = np.flatnonzero((np.diff(lengths) != 0) | np.diff(fresh) | (np.diff(rows_until) != 0)) + 1
    for start, end in pairwise([0, *changes.tolist(), batch.num_reqs]):
        if lengths[start] > 0:
            rows = slice(int(batch.query_start_loc[start]), int(batch.query_start_loc[end]))
            yield SequenceRun(slice(start, end), rows, int(lengths[start]), bool(fresh[start]), int(rows_until[start]))


class StateView:
    """What a recurrent module sees in place of mlx-lm's ``ArraysCache``; the states lie in one layer of a pool.

    A request that starts is computed with an empty cache, as mlx-lm would; one that continues, with the state that
    its last step left in the block of its last token. So a block that is full holds the state at its end, and what a
    block held for an earlier request is never read.

    Args:
        step: Shared by all views of a model.
        layer: The pool's layer.
        size: Arrays of a state.
    """

    def __init__(self, step: Step, layer: LayerCache, size: int) -> None:
        self._step = step
        self._layer = layer
        self._size = size

    def make_mask(self, N: int) -> None:
        """Return no mask: sequences are never padded."""
        del N

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module once for every run of sequences and return its outputs as rows of the step.

        Arrays of rows are cut into sequences, this view becomes an ``ArraysCache``, and the step's positions become
        the first position of each sequence. Other arguments go to every call as they are.
        """
        batch, block_size = self._step.metadata[self._layer.group].batch, self._layer.spec.block_size
        cut = state_runs(batch, block_size)
        if len(cut.runs) == 1 and cut.runs[0].length == 1 and not cut.runs[0].fresh:
            return self._decode(call, args, kwargs, cut)
        outputs, states = [], []
        for run, block_ids in zip(cut.runs, cut.before, strict=True):
            arrays: Any = ArraysCache(self._size)
            if not run.fresh:
                arrays.cache = list(self._layer.read_states(block_ids))
            ends = [end for end in (run.kept_after, run.length) if end]
            pieces = []
            for begin, end in pairwise([0, *ends]):
                piece = _Piece(self._step.positions, self, arrays, run, begin, end)
                pieces.append(call(*map(piece, args), **{name: piece(value) for name, value in kwargs.items()}))
                states.append(list(arrays.cache))
            outputs.append(_to_rows(_join(pieces, axis=1)))
        self._layer.write_states([_join(list(parts)) for parts in zip(*states, strict=True)], cut.after)
        return _join(outputs)

    def _decode(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cut: StateRuns) -> Any:
        """Run a step of one row per request: its rows are sequences as they are."""
        arrays: Any = ArraysCache(self._size)
        arrays.cache = list(self._layer.read_states(cut.before[0]))
        args = tuple(arrays if value is self else value for value in args)
        kwargs = {name: arrays if value is self else value for name, value in kwargs.items()}
        output = call(*args, **kwargs)
        self._layer.write_states(arrays.cache, cut.after)
        return output


@dataclass(frozen=True)
class _Piece:
    """Turns arguments over rows into those over rows ``begin`` up to ``end`` of every sequence of a run."""

    positions: mx.array
    view: StateView
    arrays: ArraysCache
    run: SequenceRun
    begin: int
    end: int

    def __call__(self, value: Any) -> Any:
        if value is self.view:
            return self.arrays
        rows, length = self.run.rows, self.run.length
        if value is self.positions:
            return value[rows.start + self.begin : rows.stop : length]
        if not isinstance(value, mx.array) or value.shape[:2] != (self.positions.size, 1):
            return value
        sequences = value[rows].reshape(-1, length, *value.shape[2:])
        return sequences if self.end - self.begin == length else sequences[:, self.begin : self.end]


def _to_rows(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_to_rows, output))
    if not isinstance(output, mx.array):
        raise MetalModelsError(
            f"[forward] expected a recurrent module to return arrays, got {type(output).__name__}. "
            "The model needs an adapter."
        )
    return output.reshape(-1, 1, *output.shape[2:])


def _join(parts: list[Any], axis: int = 0) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], tuple):
        return tuple(_join(list(same), axis) for same in zip(*parts, strict=True))
    return mx.concatenate(parts, axis=axis)


def run_over_sequences(module: nn.Module) -> None:
    """Let ``module`` take a ``StateView`` in place of its cache; with any other it works as before. Idempotent."""
    cls = type(module)
    if not getattr(cls, "takes_state_views", False):
        module.__class__ = _over_sequences(cls)


@cache
def _over_sequences(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        view = next((value for value in (*args, *kwargs.values()) if isinstance(value, StateView)), None)
        if view is None:
            return cls.__call__(self, *args, **kwargs)
        return view.run(lambda *cut, **named: cls.__call__(self, *cut, **named), args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "takes_state_views": True})
