"""Finds out what a model asks of its caches by running it once, lazily, over views that take notes."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from metal_models.cache_view import CacheView, Step
from metal_models.errors import UnsupportedModelError
from metal_models.head_split import HeadSplit

# More than one, so that code that needs a single Python offset shows itself.
_ROWS = 2

_CACHES = {
    "ArraysCache": "keeps recurrent or convolution state, not keys and values",
    "CacheList": "needs several caches",
    "ChunkedKVCache": "attends within chunks",
}

# What a model trips over -> what it wanted.
_MEANINGS = {
    "PagedMask": "a layer computes attention from the mask itself instead of calling the shared function",
    "changes its keys": "a layer changes its keys after caching them",
    "its own attention mask": "a layer builds an attention mask of its own",
    "Only length-1 arrays": "a layer needs one position for all rows of a step",
    "No Metal back-end": "a layer needs a kernel that exists for Metal only",
}


@dataclass(frozen=True)
class LayerTrace:
    """What one cached layer stores and how it attends.

    Attributes:
        num_kv_heads: Heads of keys and values.
        key_size: Width of a key.
        value_size: Width of a value.
        dtype: Of the stored rows.
        window: Widest window that a read of this layer asks for; None reads everything.
    """

    num_kv_heads: int
    key_size: int
    value_size: int
    dtype: mx.Dtype
    window: int | None


@dataclass(frozen=True)
class ModelTrace:
    """What a model's forward pass showed.

    Attributes:
        layers: One per cache of the model, in order; None where the model never stores anything.
        windows: What each of the model's own caches would keep; None keeps everything.
        hidden_size: Width of a hidden row.
        dtype: Of hidden rows.
        vocab_size: Width of the logits.
    """

    layers: tuple[LayerTrace | None, ...]
    windows: tuple[int | None, ...]
    hidden_size: int
    dtype: mx.Dtype
    vocab_size: int


class _NotingView(CacheView):
    """Stores nothing and returns zeros, noting shapes and windows."""

    def __init__(self, step: Step, window: int | None) -> None:
        super().__init__(step, window)
        self.stored: tuple[mx.array, mx.array] | None = None
        self.reads: list[int | None] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.stored is not None:
            raise TypeError("a layer stores keys and values more than once")
        if keys.ndim != 4 or keys.shape[2] != 1 or keys.shape[:3] != values.shape[:3]:
            raise TypeError(f"a layer stores keys {keys.shape} with values {values.shape}")
        self.stored = (keys, values)
        return super().update_and_fetch(keys, values)

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: object = None,
        soft_cap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        self.reads.append(self.window_of(mask))
        _, values = self.keys_and_values()
        return mx.zeros((*queries.shape[:3], values.shape[-1]), queries.dtype)

    def note(self) -> LayerTrace | None:
        """Return what was seen, or None when the layer was never used."""
        if self.stored is None:
            return None
        if not self.reads:
            raise TypeError("a layer attends with code of its own instead of the shared attention function")
        keys, values = self.stored
        windows = [window for window in self.reads if window is not None]
        window = max(windows) if len(windows) == len(self.reads) else None
        return LayerTrace(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, window)


def trace(model: nn.Module, split: HeadSplit, architecture: str) -> ModelTrace:
    """Run ``model`` once over two rows without evaluating anything, and return what it asked for.

    Raises:
        UnsupportedModelError: A layer asks for something the paged cache does not have.
    """
    try:
        windows = tuple(_window(cache) for cache in make_prompt_cache(model))
        step = Step()
        views = [_NotingView(step, window) for window in windows]
        step.positions = mx.arange(_ROWS, dtype=mx.int32)
        hidden = split.hidden(mx.zeros((_ROWS, 1), mx.int32), list(views))
        layers = tuple(view.note() for view in views)
        logits = split.logits(hidden)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise UnsupportedModelError(architecture, _reason(error)) from error
    if not any(layers):
        raise UnsupportedModelError(architecture, "no layer stores keys and values")
    return ModelTrace(layers, windows, hidden.shape[-1], hidden.dtype, logits.shape[-1])


def _window(cache: Any) -> int | None:
    """Return the window of one of mlx-lm's caches, or None for a full one."""
    if isinstance(cache, RotatingKVCache):
        if cache.keep:
            raise TypeError(f"a layer keeps its first {cache.keep} tokens beside a sliding window")
        return int(cache.max_size)
    if type(cache) is KVCache:
        return None
    kind = type(cache).__name__
    raise TypeError(f"a layer {_CACHES.get(kind, 'needs a cache of its own kind')} ({kind})")


def _reason(error: Exception) -> str:
    """Say in one clause what an exception out of a model's code means."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return next((reason for part, reason in _MEANINGS.items() if part in line), line)
