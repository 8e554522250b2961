"""From logits to tokens in plain MLX: by a sort of the vocabulary."""

import mlx.core as mx
from jaxtyping import Float, Int32, UInt64

_FARTHEST = 40.0
_ONE = 2.0**40
_LOW_WORD = 0xFFFFFFFF


def sample_rows(
    logits: Float[mx.array, "rows vocab"],
    uniform: Float[mx.array, "*numbers"],
    rules: Float[mx.array, "rules columns"],
) -> Int32[mx.array, "rows"]:
    """Choose a token for each row; see :func:`metal_kernels.sample_rows`."""
    rows, vocab = logits.shape
    scale, bound, top_k, top_p = (rules[:, column, None] for column in range(4))
    logits = logits.astype(mx.float32)
    highest = mx.maximum(mx.max(logits, axis=1, keepdims=True), -1e30)
    distance = (highest - logits) * scale
    ordered = mx.sort(distance, axis=1)
    last = mx.take_along_axis(ordered, mx.clip(top_k, 1, vocab).astype(mx.int32) - 1, axis=1)
    bound = mx.where((top_k >= 1) & (top_k < vocab), mx.minimum(bound, last), bound)
    running = mx.cumsum(_weights(ordered) * (ordered <= bound), axis=1)
    edge = mx.sum(running < _share(running[:, -1:], top_p), axis=1, keepdims=True)
    last = mx.take_along_axis(ordered, mx.minimum(edge, vocab - 1), axis=1)
    bound = mx.where(top_p < 1.0, mx.minimum(bound, last), bound)
    running = mx.cumsum(_weights(distance) * (distance <= bound), axis=1)
    total = running[:, -1:]
    drawn = mx.sum(running <= _share(total, uniform.reshape(-1)[:rows, None]), axis=1)
    drawn = mx.where(total[:, 0] == 0, vocab - 1, drawn)
    return mx.where(scale[:, 0] == 0.0, mx.argmax(logits, axis=1), drawn).astype(mx.int32)


def _weights(distance: Float[mx.array, "rows vocab"]) -> UInt64[mx.array, "rows vocab"]:
    """Return 2^-distance as integers, 2^40 of which are 1: their sums are the same in any order."""
    near = mx.where(distance < _FARTHEST, distance, 0.0)
    return mx.where(distance < _FARTHEST, mx.power(2.0, -near) * _ONE, 0.0).astype(mx.uint64)


def _share(total: UInt64[mx.array, "rows one"], fraction: Float[mx.array, "rows one"]) -> UInt64[mx.array, "rows one"]:
    """Return a fraction below 1 of a sum, rounded down."""
    of_word = (mx.minimum(fraction, 1.0 - 2.0**-24) * 2.0**32).astype(mx.uint64)
    high, low = mx.right_shift(total, mx.array(32, mx.uint64)), total & mx.array(_LOW_WORD, mx.uint64)
    return high * of_word + mx.right_shift(low * of_word, mx.array(32, mx.uint64))


def adjust_logits(
    logits: Float[mx.array, "rows vocab"],
    *,
    history: Float[mx.array, "slots tokens"] | None = None,
    penalties: Float[mx.array, "penalties columns"] | None = None,
    bitmask: Int32[mx.array, "masks words"] | None = None,
) -> Float[mx.array, "rows vocab"]:
    """Apply penalties and a grammar's bits; see :func:`metal_kernels.adjust_logits`."""
    vocab = logits.shape[1]
    logits = logits.astype(mx.float32)
    if history is not None and penalties is not None:
        slot, repetition, frequency, presence = (penalties[:, column, None] for column in range(4))
        past = history[mx.maximum(slot[:, 0], 0).astype(mx.int32)] * (slot >= 0)
        scale, times = mx.where(past > 0, repetition, 1.0), mx.floor(past)
        logits = mx.where(logits > 0, logits / scale, logits * scale)
        logits = logits - times * frequency - mx.minimum(times, 1.0) * presence
    if bitmask is not None:
        bits = mx.right_shift(bitmask[:, :, None].view(mx.uint32), mx.arange(32, dtype=mx.uint32)) & 1
        allowed = bits.reshape(len(bitmask), -1)[:, :vocab] == 1
        logits = mx.where(allowed, logits, -float("inf"))
    return logits
