"""Runs a module that needs sequences on a step of token rows, and keeps its states in a pool."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache

from metal_kernels import RaggedBatch
from metal_kv.layer_cache import LayerCache
from metal_kv.recurrent_state import BlockIds, StateBlocks, state_blocks
from metal_models.cache_view import Step
from metal_models.compiled_calls import CompiledCalls
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
    before: tuple[BlockIds, ...]
    after: BlockIds

    @property
    def decodes(self) -> bool:
        """Whether every request has one row and continues a state."""
        return len(self.runs) == 1 and self.runs[0].length == 1 and not self.runs[0].fresh


def state_runs(batch: RaggedBatch, block_size: int) -> StateRuns:
    """Cut a step into runs for layers whose states lie in blocks of ``block_size`` tokens."""
    return batch.once(("state runs", block_size), lambda: _state_runs(batch, state_blocks(batch, block_size)))


def _state_runs(batch: RaggedBatch, blocks: StateBlocks) -> StateRuns:
    if batch.num_reqs and batch.one_row_each and blocks.before.all():
        everything = slice(0, batch.num_reqs)
        run = SequenceRun(everything, everything, 1, fresh=False, kept_after=0)
        return StateRuns((run,), (BlockIds(blocks.before),), BlockIds(blocks.after))
    runs = tuple(_runs(batch, blocks.rows_until))
    after = []
    for run in runs:
        kept = [blocks.inside[run.requests]] if run.kept_after else []
        after += [*kept, blocks.after[run.requests]]
    before = tuple(BlockIds(blocks.before[run.requests]) for run in runs)
    return StateRuns(runs, before, BlockIds(np.concatenate(after)))


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
        compiles: Whether calls of decode steps are compiled.
    """

    def __init__(self, step: Step, layer: LayerCache, size: int, *, compiles: bool = False) -> None:
        self._step = step
        self._layer = layer
        self._size = size
        self._compiles = compiles
        self._compiled: dict[int, CompiledCalls] = {}

    def make_mask(self, N: int) -> None:
        """Return no mask: sequences are never padded."""
        del N

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module once for every run of sequences and return its outputs as rows of the step.

        Arrays of rows are cut into sequences, this view becomes an ``ArraysCache``, and the step's positions become
        the first position of each sequence. Other arguments go to every call as they are.
        """
        cut = self._cut()
        if cut.decodes:
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

    def run_compiled(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return a module's output for a step of one row per request, from a compiled graph; None if there is none.

        The module may be the one that needs sequences, or one around it that is given this view, too.
        """
        positions, values = self._step.positions, (*args, *kwargs.values())
        if not self._compiles or not self._step.plain or any(value is positions for value in values):
            return None  # rotary modules look at which array the positions are
        cut = self._cut()
        if not cut.decodes:
            return None
        compiled = self._compiled.get(id(module))
        if compiled is None:
            compiled = self._compiled[id(module)] = CompiledCalls(module)
        rows, read = len(cut.after.ids), partial(self._read, cut.before[0])
        result = compiled(partial(_with_states, call), args, kwargs, self, rows, read)
        if result is None:
            return None
        output, states = result
        self._layer.write_states(states, cut.after)
        return output

    def _cut(self) -> StateRuns:
        return state_runs(self._step.metadata[self._layer.group].batch, self._layer.spec.block_size)

    def _decode(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cut: StateRuns) -> Any:
        """Run a step of one row per request: its rows are sequences as they are."""
        output, states = _with_states(call, args, kwargs, self, self._read(cut.before[0]))
        self._layer.write_states(states, cut.after)
        return output

    def _read(self, block_ids: BlockIds) -> list[mx.array]:
        return list(self._layer.read_states(block_ids))


def _with_states(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], view: object, states: list[Any]
) -> tuple[Any, list[Any]]:
    """Call a module with mlx-lm's cache of ``states`` in the place of ``view``; return the states it leaves, too."""
    arrays: Any = ArraysCache(len(states))
    arrays.cache = states
    args = tuple(arrays if value is view else value for value in args)
    kwargs = {name: arrays if value is view else value for name, value in kwargs.items()}
    output = call(*args, **kwargs)
    return output, arrays.cache


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
    if not getattr(type(module), "takes_state_views", False):
        module.__class__ = _over_sequences(type(module))


def compile_decoding(module: nn.Module) -> None:
    """Let ``module``, which hands a ``StateView`` on to one that takes it, be compiled for decoding. Idempotent."""
    cls = type(module)
    if not getattr(cls, "takes_state_views", False) and not getattr(cls, "compiles_decoding", False):
        module.__class__ = _compiling(cls)


def _view_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StateView | None:
    for value in args:
        if isinstance(value, StateView):
            return value
    return next((value for value in kwargs.values() if isinstance(value, StateView)), None)


@cache
def _over_sequences(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        view = _view_among(args, kwargs)
        if view is None:
            return cls.__call__(self, *args, **kwargs)
        plain = partial(cls.__call__, self)
        output = view.run_compiled(self, plain, args, kwargs)
        return view.run(plain, args, kwargs) if output is None else output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "takes_state_views": True})


@cache
def _compiling(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        view = _view_among(args, kwargs)
        output = None if view is None else view.run_compiled(self, partial(cls.__call__, self), args, kwargs)
        return cls.__call__(self, *args, **kwargs) if output is None else output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "compiles_decoding": True})
