"""Finds out what a model asks of its caches by running it once, lazily, over views that take notes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from metal_models.attention_layer import NotingView
from metal_models.cache_view import Step
from metal_models.chunked_layer import NotingChunks
from metal_models.errors import UnsupportedModelError
from metal_models.head_split import HeadSplit
from metal_models.layer import Layer, NotingCache, NotingList, all_specs
from metal_models.module_calls import ModuleCalls, watched
from metal_models.recurrent_layer import NotingStates

# More than one, so that code that needs a single Python offset shows itself.
_ROWS = 2

# What a model trips over -> what it wanted.
_MEANINGS = {
    "PagedMask": "a layer computes attention from the mask itself instead of calling the shared function",
    "changes its keys": "a layer changes its keys after caching them",
    "its own attention mask": "a layer builds an attention mask of its own",
    "Only length-1 arrays": "a layer needs one position for all rows of a step",
    "No Metal back-end": "a layer needs a kernel that exists for Metal only",
}


@dataclass(frozen=True)
class ModelTrace:
    """What a model's forward pass showed.

    Attributes:
        layers: What stands behind each of the model's caches, in their order, by name.
        hidden_size: Width of a hidden row.
        dtype: Of hidden rows.
        vocab_size: Width of the logits.
    """

    layers: dict[str, Layer]
    hidden_size: int
    dtype: mx.Dtype
    vocab_size: int


class _TracedStep(Step):
    """The step of a trace, and the modules under way in it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = ModuleCalls()


def trace(model: nn.Module, split: HeadSplit, architecture: str) -> ModelTrace:
    """Run ``model`` once over two rows without evaluating anything, and return what it asked for.

    Raises:
        UnsupportedModelError: A layer asks for something the paged cache does not have.
    """
    try:
        step = _TracedStep()
        views = [_noting(step, cache) for cache in make_prompt_cache(model)]
        step.positions = mx.arange(_ROWS, dtype=mx.int32)
        with watched(model, step.calls):
            hidden = split.hidden(mx.zeros((_ROWS, 1), mx.int32), list(views))
        layers = {f"layers.{index}": view.note() for index, view in enumerate(views)}
        logits = split.logits(hidden)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise UnsupportedModelError(architecture, _reason(error)) from error
    if not all_specs(layers, 16):
        raise UnsupportedModelError(architecture, "no layer stores anything")
    return ModelTrace(layers, hidden.shape[-1], hidden.dtype, logits.shape[-1])


def _noting(step: _TracedStep, cache: Any) -> NotingCache:
    """Return what takes notes in place of one of mlx-lm's caches."""
    note = _KINDS.get(type(cache))
    if note is None:
        raise TypeError(f"a layer needs a cache of its own kind ({type(cache).__name__})")
    return note(step, cache)


def _full(step: _TracedStep, cache: KVCache) -> NotingCache:
    del cache
    return NotingView(step, None)


def _rotating(step: _TracedStep, cache: RotatingKVCache) -> NotingCache:
    if cache.keep:
        raise TypeError(f"a layer keeps its first {cache.keep} tokens beside a sliding window")
    return NotingView(step, int(cache.max_size))


def _states(step: _TracedStep, cache: ArraysCache) -> NotingCache:
    return NotingStates(len(cache.cache), step.calls)


def _chunked(step: Step, cache: ChunkedKVCache) -> NotingCache:
    return NotingChunks(step, int(cache.chunk_size))


def _list(step: _TracedStep, cache: CacheList) -> NotingCache:
    return NotingList([_noting(step, part) for part in cache.caches])


# Kind of mlx-lm's cache -> what takes notes in its place. A new kind of layer is one line here.
_KINDS: dict[type, Callable[[_TracedStep, Any], NotingCache]] = {
    KVCache: _full,
    RotatingKVCache: _rotating,
    ArraysCache: _states,
    ChunkedKVCache: _chunked,
    CacheList: _list,
}


def _reason(error: Exception) -> str:
    """Say in one clause what an exception out of a model's code means."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return next((reason for part, reason in _MEANINGS.items() if part in line), line)
