"""Which rows are attended together, and where in the cache their keys are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from metal_kernels.ragged import RaggedBatch

# Keys that padding may add to one group of single-row requests: what another group's operations cost.
_MAX_PADDED_KEYS = 128
# Rows of keys that one group gathers at most, unless one request has more: beyond, caches hold them no longer.
_MAX_GATHERED_ROWS = 8192
# Rows of one request that are attended at once; fewer rows waste fewer scores above the causal diagonal.
_TILE_ROWS = 256

Mask = mx.array | Literal["causal"] | None


@dataclass(frozen=True)
class RowTile:
    """Rows attended together: ``keys`` is their part of the group's keys."""

    rows: slice | mx.array
    keys: slice
    mask: Mask


@dataclass(frozen=True)
class KeyGroup:
    """Requests whose keys are gathered together.

    ``key_rows`` and ``value_rows`` are uint32 [requests, kv_heads, keys]: rows of the cache seen as
    [rows, head_size]. A ``single_row`` group has one tile with one row for each request; any other group is
    one request.
    """

    key_rows: mx.array
    value_rows: mx.array
    single_row: bool
    tiles: tuple[RowTile, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """All groups of a step; ``restore`` puts the concatenated outputs back in the rows' order."""

    groups: tuple[KeyGroup, ...]
    restore: mx.array | None


def plan_attention(
    batch: RaggedBatch, sliding_window: int | None, block_size: int, kv_heads: int, halves: int = 2
) -> AttentionPlan:
    """Plan one step for layers that share ``sliding_window`` and a cache shape.

    A page has two ``halves``, keys and values, or one of rows that are both.
    """
    starts, query_lens, ends = batch.query_start_loc, batch.query_lens, batch.seq_lens
    # The first key that a request's first row sees.
    begins = np.zeros_like(ends)
    if sliding_window is not None:
        begins = np.maximum(0, ends - query_lens + 1 - sliding_window)
    groups, order = [], []
    singles = np.flatnonzero(query_lens == 1)
    for requests in _similar_lengths(singles, ends - begins, _MAX_GATHERED_ROWS // kv_heads):
        first_keys, num_keys = begins[requests], ends[requests] - begins[requests]
        rows = starts[requests]
        order.append(rows)
        positions = np.minimum(
            first_keys[:, None] + np.arange(num_keys.max(), dtype=np.int32), ends[requests, None] - 1
        )
        mask = None
        if num_keys.min() < num_keys.max():
            mask = mx.array((np.arange(num_keys.max()) < num_keys[:, None])[:, None, None])
        tile = RowTile(_as_slice(rows), slice(None), mask)
        groups.append(_group(batch, requests, positions, block_size, kv_heads, halves, True, (tile,)))
    for request in np.flatnonzero(query_lens > 1):
        begin, end = int(begins[request]), int(ends[request])
        start, rows = int(starts[request]), int(query_lens[request])
        order.append(np.arange(start, start + rows, dtype=np.int32))
        positions = np.arange(begin, end, dtype=np.int32)[None]
        tiles = tuple(_tiles(start, rows, begin, end, sliding_window))
        groups.append(_group(batch, np.array([request]), positions, block_size, kv_heads, halves, False, tiles))
    order = np.concatenate(order)
    in_order = bool((np.diff(order) == 1).all())
    restore = None if in_order else mx.array(np.argsort(order).astype(np.uint32))
    return AttentionPlan(tuple(groups), restore)


def _similar_lengths(requests: np.ndarray, num_keys: np.ndarray, max_keys: int) -> Iterator[np.ndarray]:
    """Split ``requests`` so that padding each part to its longest context adds few keys to ``max_keys`` or less."""
    by_length = requests[np.argsort(-num_keys[requests], kind="stable")]
    part: list[int] = []
    padded = 0
    for request in by_length.tolist():
        longest = int(num_keys[part[0]]) if part else 0
        padded += longest - int(num_keys[request]) if part else 0
        if part and (padded > _MAX_PADDED_KEYS or longest * (len(part) + 1) > max_keys):
            yield np.sort(part)
            part, padded = [], 0
        part.append(request)
    if part:
        yield np.sort(part)


def _tiles(start: int, rows: int, begin: int, end: int, window: int | None) -> Iterator[RowTile]:
    """Cut the ``rows`` rows from ``start`` into tiles; the request's gathered keys are [begin, end)."""
    for offset in range(0, rows, _TILE_ROWS):
        count = min(_TILE_ROWS, rows - offset)
        first_position = end - rows + offset
        key_end = first_position + count
        key_begin, mask = begin, None
        if window is not None:
            key_begin = max(0, first_position + 1 - window)
        if window is not None and key_end - key_begin > window:
            distance = np.arange(first_position, key_end)[:, None] - np.arange(key_begin, key_end)
            mask = mx.array((distance >= 0) & (distance < window))
        yield RowTile(
            slice(start + offset, start + offset + count),
            slice(key_begin - begin, key_end - begin),
            "causal" if mask is None else mask,
        )


def _group(
    batch: RaggedBatch,
    requests: np.ndarray,
    positions: np.ndarray,
    block_size: int,
    kv_heads: int,
    halves: int,
    single_row: bool,
    tiles: tuple[RowTile, ...],
) -> KeyGroup:
    blocks = batch.block_table[requests[:, None], positions // block_size].astype(np.uint32)
    key_slots = blocks * np.uint32(halves * block_size) + (positions % block_size).astype(np.uint32)
    heads = np.arange(kv_heads, dtype=np.uint32)[None, :, None]
    key_rows = key_slots[:, None] * np.uint32(kv_heads) + heads
    value_rows = key_rows + np.uint32((halves - 1) * block_size * kv_heads)
    return KeyGroup(mx.array(key_rows), mx.array(value_rows), single_row, tiles)


def _as_slice(rows: np.ndarray) -> slice | mx.array:
    """Return consecutive ``rows`` as a slice: a view instead of a copy."""
    if (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return mx.array(rows)
