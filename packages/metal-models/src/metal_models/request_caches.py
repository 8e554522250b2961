"""mlx-lm's caches of one request: copied, cut and put together again."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache

Caches = list[Any]
"""One of mlx-lm's caches for each layer that has one."""


def cuttable(cache: Any) -> bool:
    """Tell whether any prefix of the cache's rows is the cache after that many tokens."""
    return type(cache) is KVCache


def state_arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Return every array in the caches."""
    return [leaf for cache in caches for _, leaf in _leaves(cache.state) if isinstance(leaf, mx.array)]


def rows(caches: Caches, begin: int, end: int) -> list[mx.array]:
    """Return keys and values of some positions of every cuttable cache, in memory of their own."""
    return [
        mx.contiguous(array[..., begin:end, :])
        for cache in caches
        if cuttable(cache)
        for array in (cache.keys, cache.values)
    ]


def snapshot(caches: Caches) -> tuple[Caches, int]:
    """Return copies of the caches that cannot be cut, in order, and their bytes.

    The copies share memory with the originals; MLX copies it when either is written to.
    """
    copies = [_copy(cache) for cache in caches if not cuttable(cache)]
    return copies, sum(array.nbytes for array in state_arrays(copies))


def restore(new: Caches, pieces: Sequence[Sequence[mx.array]], length: int, states: Caches | None) -> Caches:
    """Return caches of ``length`` tokens.

    Args:
        new: Empty caches of the model.
        pieces: For each array of ``rows`` its parts in order.
        length: Tokens that they are of.
        states: What ``snapshot`` returned after that many tokens, if there are caches that cannot be cut.
    """
    arrays = (parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=-2) for parts in pieces)
    left = iter(states or ())
    restored = []
    for cache in new:
        if cuttable(cache):
            # Arrays of our own: writing to an array changes it for everybody who has the same object.
            cache.state = (mx.array(next(arrays)), mx.array(next(arrays)), length)
            restored.append(cache)
        else:
            restored.append(_copy(next(left)))
    return restored


def _copy(cache: Any) -> Any:
    state = tree_map(lambda leaf: mx.array(leaf) if isinstance(leaf, mx.array) else leaf, cache.state)
    make: Any = type(cache).from_state
    return make(state)


def _leaves(state: Any) -> Any:
    return tree_flatten(state)
