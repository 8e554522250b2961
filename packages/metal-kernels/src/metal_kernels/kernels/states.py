"""States of recurrent layers, copied out of their pages and back in one launch each."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from math import prod

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.self_test import move_pages
from metal_kernels.kernels.source import PortableKernel, order_input

MOST_ARRAYS = 4
_THREADS = 256
_SLICE_WORDS = 4 * _THREADS
_LEAST_ELEMENTS = 8


def move_states(kv_cache: mx.array, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[mx.Dtype]) -> bool:
    """Whether these kernels copy states of such arrays: a few of them, each of whole words."""
    sizes = [prod(shape) for shape in shapes]
    return (
        len(sizes) <= MOST_ARRAYS
        and all(size * dtype.size % 4 == 0 for size, dtype in zip(sizes, dtypes, strict=True))
        and min(sizes) >= _LEAST_ELEMENTS
        and move_pages(kv_cache)
    )


def gather_states(
    kv_cache: Float[mx.array, "blocks 2 1 1 words"],
    block_ids: Int32[mx.array, "states"],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
    order_token: mx.array | None,
) -> list[mx.array]:
    """Return the arrays ``[states, *shape]`` that lie one after another in the pages ``block_ids``.

    Args:
        kv_cache: Pages.
        block_ids: Pages to read, at least one.
        shapes: Of the arrays of one state.
        dtypes: Of the same.
        order_token: Of the last write.
    """
    words = [prod(shape) * dtype.size // 4 for shape, dtype in zip(shapes, dtypes, strict=True)]
    num_states = block_ids.size
    return _gather(len(words))(
        [kv_cache, block_ids, order_input(order_token)],
        [((num_states, *shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)],
        threadgroups=(num_states, _slices(words)),
        threads=_THREADS,
        template=_template(kv_cache, words),
    )


def scatter_states(
    kv_cache: Float[mx.array, "blocks 2 1 1 words"],
    block_ids: Int32[mx.array, "states"],
    states: Sequence[mx.array],
    order_token: mx.array | None = None,
) -> tuple[Float[mx.array, "blocks 2 1 1 words"], mx.array]:
    """Write states into the pages ``block_ids`` in place; return the pages and an order token.

    What lies in a page behind the state is left as it is, and a state whose page is negative goes nowhere.

    Args:
        kv_cache: Pages.
        block_ids: Pages to write, at least one.
        states: The arrays, ``[states, *shape]`` each.
        order_token: Of the last read, where the states do not follow from it.
    """
    words = [prod(state.shape[1:]) * state.dtype.size // 4 for state in states]
    (order_token,) = _scatter(len(words))(
        [kv_cache, block_ids, *map(mx.contiguous, states), order_input(order_token)],
        [((8,), mx.int32)],
        threadgroups=(block_ids.size, _slices(words)),
        threads=_THREADS,
        template=_template(kv_cache, words) | {"T": kv_cache.dtype},
    )
    return kv_cache, order_token


def _slices(words: Sequence[int]) -> int:
    """Threadgroups that share a state."""
    return max(1, -(-max(words) // _SLICE_WORDS))


def _template(kv_cache: mx.array, words: Sequence[int]) -> dict[str, int | mx.Dtype]:
    starts = list(accumulate(words, initial=0))
    template: dict[str, int | mx.Dtype] = {
        "PAGE_WORDS": prod(kv_cache.shape[1:]) * kv_cache.dtype.size // 4,
        "THREADS": _THREADS,
        "STRIDE": _THREADS * _slices(words),
    }
    for index, count in enumerate(words):
        template |= {f"START_{index}": starts[index], f"WORDS_{index}": count}
    return template


@cache
def _gather(count: int) -> PortableKernel:
    outputs = tuple(f"state_{index}" for index in range(count))
    inputs = ("kv_cache_in", "blocks_in", "order_in")
    return PortableKernel(f"gather_states_{count}", inputs, outputs, "gather_states.metal", f"#define COUNT {count}\n")


@cache
def _scatter(count: int) -> PortableKernel:
    inputs = ("kv_cache_in", "blocks_in", *(f"state_{index}" for index in range(count)), "order_in")
    return PortableKernel(
        f"scatter_states_{count}", inputs, ("order_out",), "scatter_states.metal", f"#define COUNT {count}\n"
    )
