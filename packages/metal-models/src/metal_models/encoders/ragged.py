"""Attention of every token to all tokens of its own sequence, for sequences of different lengths."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

SHORT = 32
"""Sequences up to this length are not told apart: padding them costs less than another operation."""
MAX_SCORES = 1 << 26
"""Products of queries and keys that one operation may hold, where the device has no kernel that holds fewer."""
WINDOW_QUERIES = 512
"""Queries of a layer with a window that are computed together over the keys that any of them sees."""


@dataclass(frozen=True, eq=False)
class _Bucket:
    """Sequences of similar lengths, padded to the longest.

    Attributes:
        rows: int32 ``[sequences * length]``, of the step's rows; of padding any.
        keys: bool ``[sequences, 1, 1, length]``: which are no padding; None where none is.
    """

    num_sequences: int
    length: int
    rows: mx.array
    keys: mx.array | None
    windows: dict[tuple[int, ...], mx.array] = field(default_factory=dict)


class RaggedSequences:
    """The sequences of a step, whose rows follow one another.

    Queries, keys and values are padded for attention alone, among sequences of which the shortest has more than half
    the tokens of the longest.

    Args:
        query_start_loc: Row at which each sequence starts, and their number of rows.

    Attributes:
        positions: Of each row in its sequence, from 0.
    """

    def __init__(self, query_start_loc: Int32[np.ndarray, "reqs_plus_1"]) -> None:
        lengths = np.diff(query_start_loc)
        self.positions = mx.array(
            np.arange(query_start_loc[-1], dtype=np.int32) - np.repeat(query_start_loc[:-1], lengths).astype(np.int32)
        )
        place = np.zeros(query_start_loc[-1], np.int32)
        self._buckets: list[_Bucket] = []
        start = 0
        for sequences in _by_length(lengths):
            length = int(lengths[sequences].max())
            offsets = np.arange(length, dtype=np.int32)
            inside = offsets < lengths[sequences][:, None]
            rows = np.where(inside, query_start_loc[sequences][:, None] + offsets, 0).astype(np.int32)
            place[rows[inside]] = start + np.flatnonzero(inside)
            keys = None if inside.all() else mx.array(inside[:, None, None])
            self._buckets.append(_Bucket(len(sequences), length, mx.array(rows.reshape(-1)), keys))
            start += rows.size
        # With one bucket and no padding the rows are where they are wanted, in order.
        self._in_place = len(self._buckets) == 1 and self._buckets[0].keys is None
        self._place = mx.array(place)

    def attend(
        self,
        query: Float[mx.array, "tokens heads head_size"],
        key: Float[mx.array, "tokens heads head_size"],
        value: Float[mx.array, "tokens heads head_size"],
        *,
        scale: float,
        window: int | None = None,
    ) -> Float[mx.array, "tokens heads head_size"]:
        """Return each row's mean of the values of its sequence, weighted by attention.

        Args:
            query: Of each row.
            key: Likewise.
            value: Likewise.
            scale: Factor of products of queries and keys.
            window: How far a row sees to either side; None for the whole sequence.
        """
        outputs = []
        for bucket in self._buckets:
            q, k, v = (self._padded(rows, bucket) for rows in (query, key, value))
            out = _attend(q, k, v, bucket, scale, window)
            outputs.append(out.swapaxes(1, 2).reshape(-1, *query.shape[1:]))
        joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        return joined if self._in_place else joined[self._place]

    def _padded(self, rows: mx.array, bucket: _Bucket) -> mx.array:
        """Return ``[sequences, heads, length, head_size]`` of ``[tokens, heads, head_size]``."""
        taken = rows if self._in_place else rows[bucket.rows]
        return taken.reshape(bucket.num_sequences, bucket.length, *rows.shape[1:]).swapaxes(1, 2)


def _by_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Divide sequences into groups of similar lengths, each in the order of the step."""
    order = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = []
    longest = 0
    for sequence in order:
        if not groups or (longest > SHORT and 2 * lengths[sequence] <= longest):
            groups.append([])
            longest = int(lengths[sequence])
        groups[-1].append(int(sequence))
    return [np.sort(np.array(group)) for group in groups]


def _attend(
    query: mx.array, key: mx.array, value: mx.array, bucket: _Bucket, scale: float, window: int | None
) -> mx.array:
    """Attend within one bucket, over as many queries at a time as memory and the window ask for."""
    length, per_query = bucket.length, query.shape[0] * query.shape[1] * bucket.length
    step = max(1, MAX_SCORES // per_query)
    if window is not None:
        step = min(step, max(WINDOW_QUERIES, 2 * window))
    pieces = []
    for start in range(0, length, step):
        end = min(length, start + step)
        first, last = (0, length) if window is None else (max(0, start - window), min(length, end + window))
        mask = bucket.keys if bucket.keys is None else bucket.keys[..., first:last]
        if window is not None and last - first > window + 1:
            near = _near(bucket, start, end, first, last, window)
            mask = near if mask is None else near & mask
        pieces.append(
            mx.fast.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, first:last], value[:, :, first:last], scale=scale, mask=mask
            )
        )
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def _near(bucket: _Bucket, start: int, end: int, first: int, last: int, window: int) -> mx.array:
    """Return which keys ``first … last`` are at most ``window`` from queries ``start … end``, kept for more layers."""
    shape = (start - first, end - start, last - first, window)
    if shape not in bucket.windows:
        distance = mx.arange(end - start)[:, None] + (start - first) - mx.arange(last - first)
        bucket.windows[shape] = mx.abs(distance) <= window
    return bucket.windows[shape]
