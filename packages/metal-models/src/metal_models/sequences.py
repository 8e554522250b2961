"""Runs a module that needs sequences on a step of token rows, and keeps its states in a pool."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache

from metal_kernels import RaggedBatch
from metal_kv.pool import LayerCache
from metal_kv.recurrent_state import state_blocks
from metal_models.cache_view import Step
from metal_models.errors import MetalModelsError


@dataclass(frozen=True)
class SequenceRun:
    """Neighbouring requests of a step that have equally many rows: one batch ``[requests, length]``.

    Attributes:
        requests: Their places in the step.
        rows: Their rows.
        length: Rows of each.
        fresh: Whether they start here; else all continue a state.
    """

    requests: slice
    rows: slice
    length: int
    fresh: bool


def sequence_runs(batch: RaggedBatch) -> tuple[SequenceRun, ...]:
    """Cut a step into runs, in row order: all decode rows are one, every piece of a prompt most often its own."""
    kept: tuple[SequenceRun, ...] = batch.once("sequence runs", lambda: tuple(_runs(batch)))
    return kept


def _runs(batch: RaggedBatch) -> list[SequenceRun]:
    lengths, fresh = batch.query_lens, batch.seq_lens == batch.query_lens
    changes = np.flatnonzero((np.diff(lengths) != 0) | np.diff(fresh)) + 1
    bounds = [0, *changes.tolist(), batch.num_reqs]
    return [
        SequenceRun(
            slice(start, end),
            slice(int(batch.query_start_loc[start]), int(batch.query_start_loc[end])),
            int(lengths[start]),
            bool(fresh[start]),
        )
        for start, end in pairwise(bounds)
        if lengths[start] > 0
    ]


def _state_ids(batch: RaggedBatch, block_size: int) -> tuple[list[mx.array], mx.array]:
    """Return the blocks of the states that each run continues, and those of the states that all runs leave."""
    runs, blocks = sequence_runs(batch), state_blocks(batch, block_size)
    before = [mx.array(blocks.before[run.requests]) for run in runs]
    return before, mx.array(np.concatenate([blocks.after[run.requests] for run in runs]))


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
        metadata = self._step.metadata[self._layer.group]
        batch, block_size = metadata.batch, self._layer.spec.block_size
        before, after = batch.once(("state ids", block_size), lambda: _state_ids(batch, block_size))
        outputs, states = [], []
        for run, block_ids in zip(sequence_runs(batch), before, strict=True):
            arrays: Any = ArraysCache(self._size)
            if not run.fresh:
                arrays.cache = list(self._layer.read_states(block_ids))
            cut = _Cut(self._step.positions, self, arrays, run)
            outputs.append(cut.to_rows(call(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()})))
            states.append(arrays.cache)
        self._layer.write_states([_join(list(parts)) for parts in zip(*states, strict=True)], after)
        return _join(outputs)


@dataclass(frozen=True)
class _Cut:
    """Turns a call over rows into a call over the sequences of one run, and its result back."""

    positions: mx.array
    view: StateView
    arrays: ArraysCache
    run: SequenceRun

    def __call__(self, value: Any) -> Any:
        if value is self.view:
            return self.arrays
        rows, length = self.run.rows, self.run.length
        if value is self.positions:
            return value[rows.start : rows.stop : length]
        if not isinstance(value, mx.array) or value.shape[:2] != (self.positions.size, 1):
            return value
        return value[rows].reshape(-1, length, *value.shape[2:])

    def to_rows(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(map(self.to_rows, output))
        if not isinstance(output, mx.array):
            raise MetalModelsError(
                f"[forward] expected a recurrent module to return arrays, got {type(output).__name__}. "
                "The model needs an adapter."
            )
        return output.reshape(-1, 1, *output.shape[2:])


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], tuple):
        return tuple(_join(list(same)) for same in zip(*parts, strict=True))
    return mx.concatenate(parts)


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
