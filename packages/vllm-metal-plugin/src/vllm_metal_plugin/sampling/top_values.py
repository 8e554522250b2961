"""The largest entries of each row without sorting the vocabulary."""

import mlx.core as mx
from jaxtyping import Float, Int32

_LANES = 16
_PRUNE_BELOW = 512


def lanes(values: Float[mx.array, "rows vocab"], num_lanes: int, fill: float) -> Float[mx.array, "rows lanes columns"]:
    """View each row as ``num_lanes`` stripes; entry ``[lane, column]`` is token ``lane * columns + column``.

    Reducing over the lanes walks whole stripes, which is several times faster on a CPU than reducing over
    neighbours. A width that does not divide is padded with ``fill``.
    """
    rows, vocab = values.shape
    columns = -(-vocab // num_lanes)
    if columns * num_lanes != vocab:
        values = mx.pad(values, [(0, 0), (0, columns * num_lanes - vocab)], constant_values=fill)
    return values.reshape(rows, num_lanes, columns)


def row_max(values: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows one"]:
    """Return the largest entry of each row."""
    return mx.max(mx.max(lanes(values, 64, -float("inf")), axis=1), axis=1, keepdims=True)


def row_sum(values: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows one"]:
    """Return the sum of each row."""
    return mx.sum(mx.sum(lanes(values, 64, 0.0), axis=1), axis=1, keepdims=True)


def _candidates(
    values: Float[mx.array, "rows vocab"], k: int
) -> tuple[Float[mx.array, "rows some"], Int32[mx.array, "rows some"]]:
    """Return entries, with their positions, among which are the ``k`` largest of each row.

    The columns holding the ``k`` largest column maxima contain the ``k`` largest entries.
    """
    striped = lanes(values, _LANES, -float("inf"))
    columns = striped.shape[2]
    best = mx.argpartition(mx.max(striped, axis=1), columns - k, axis=1)[:, columns - k :]
    picked = mx.take_along_axis(striped, best[:, None, :], axis=2)
    positions = best[:, None, :].astype(mx.int32) + mx.arange(_LANES, dtype=mx.int32)[:, None] * columns
    return picked.reshape(values.shape[0], -1), positions.reshape(values.shape[0], -1)


def _prunes(vocab: int, k: int) -> bool:
    return k <= _PRUNE_BELOW and k * _LANES * 2 <= vocab


def top_values(values: Float[mx.array, "rows vocab"], k: int) -> Float[mx.array, "rows k"]:
    """Return the ``k`` largest entries of each row, largest first."""
    if _prunes(values.shape[1], k):
        values, _ = _candidates(values, k)
    if k < values.shape[1]:
        values = mx.topk(values, k, axis=1)
    return mx.sort(values, axis=1)[:, ::-1]


def top_tokens(values: Float[mx.array, "rows vocab"], k: int) -> Int32[mx.array, "rows k"]:
    """Return the positions of the ``k`` largest entries of each row, best first."""
    vocab = values.shape[1]
    picked, positions = values, mx.broadcast_to(mx.arange(vocab, dtype=mx.int32), values.shape)
    if _prunes(vocab, k):
        picked, positions = _candidates(values, k)
    if k < picked.shape[1]:
        best = mx.argpartition(picked, picked.shape[1] - k, axis=1)[:, picked.shape[1] - k :]
        picked, positions = (mx.take_along_axis(array, best, axis=1) for array in (picked, positions))
    order = mx.argsort(-picked, axis=1)
    return mx.take_along_axis(positions, order, axis=1)
