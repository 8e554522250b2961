"""Weights from logits, and one token per row from weights: the inverse of the cumulative distribution."""

import mlx.core as mx
from jaxtyping import Float, Int32

from vllm_metal_plugin.sampling.top_values import lanes, row_max, row_sum

_LANES = 64
_LOWEST = -1e30
_CACHED_ELEMENTS = 400_000
"""Elements worked on at a time on a CPU, so that the intermediate steps stay in its cache."""
_BELOW_ONE = 1.0 - 2.0**-23

# exp(x) = 2**n * 2**f with f in [-1/2, 1/2]; 2**f by a minimax polynomial, relative error 9e-8.
_LOG2_E = 1.4426950408889634
_ROUND = 12582912.0
_POLYNOMIAL = (0.00132647269, 0.009671512661, 0.05550733744, 0.2402224208, 0.6931469776, 1.0)


def _exp_of_nonpositive(x: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows vocab"]:
    """Return exp(x) for x <= 0; below -87 the result is tiny instead of 0.

    MLX's exp takes 19 ns an element on x86 (no vector code); these whole-array steps take 8.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return mx.exp(x)
    rows = max(1, _CACHED_ELEMENTS // max(1, x.shape[1]))
    parts = [_exp_polynomial(x[start : start + rows]) for start in range(0, x.shape[0], rows)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _exp_polynomial(x: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows vocab"]:
    scaled = mx.maximum(x * _LOG2_E, -126.0)
    rounded = scaled + _ROUND
    fraction = scaled - (rounded - _ROUND)
    power = fraction * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        power = power * fraction + coefficient
    # The low bits of `rounded` are n; moved to the exponent's place they multiply by 2**n.
    exponent = mx.left_shift(mx.view(rounded, mx.int32), mx.array(23, dtype=mx.int32))
    return mx.view(mx.view(power, mx.int32) + exponent, mx.float32)


def weights(
    logits: Float[mx.array, "rows vocab"], inverse_temperature: Float[mx.array, "rows one"] | None = None
) -> Float[mx.array, "rows vocab"]:
    """Return exp((logits - row maximum) / temperature); the largest is exactly 1.

    Forbidden tokens (-inf) get 0 on a GPU and at most 1.2e-38 on a CPU, which no draw can reach.
    """
    centred = logits - mx.maximum(row_max(logits), _LOWEST)
    if inverse_temperature is not None:
        centred = centred * inverse_temperature
    return _exp_of_nonpositive(centred)


def log_sum_exp(logits: Float[mx.array, "rows vocab"]) -> Float[mx.array, "rows one"]:
    """Return log(sum(exp(logits))) per row."""
    largest = mx.maximum(row_max(logits), _LOWEST)
    return largest + mx.log(row_sum(_exp_of_nonpositive(logits - largest)))


def draw(
    weight: Float[mx.array, "rows vocab"], uniform: Float[mx.array, "rows draws"]
) -> Int32[mx.array, "rows draws"]:
    """Return the tokens at which the running sum of ``weight`` passes ``uniform`` times its total.

    The sum runs column by column over the stripes of ``lanes``: first over the columns' totals, then inside
    the one column that was hit, so float32 is exact enough for any vocabulary.
    """
    striped = lanes(weight, _LANES, 0.0)
    columns = striped.shape[2]
    running = mx.cumsum(mx.sum(striped, axis=1), axis=1)
    total = running[:, -1:]
    target = mx.minimum(uniform * total, total * _BELOW_ONE)
    column = _passes(running[:, None], target)
    before = mx.take_along_axis(running, mx.maximum(column - 1, 0), axis=1) * (column > 0)
    hit = mx.take_along_axis(striped, column[:, None, :], axis=2)
    inside = mx.cumsum(mx.swapaxes(hit, 1, 2), axis=2)
    lane = _passes(inside, mx.minimum(target - before, inside[:, :, -1] * _BELOW_ONE))
    return mx.minimum(lane * columns + column, weight.shape[1] - 1)


def _passes(running: mx.array, target: Float[mx.array, "rows draws"]) -> Int32[mx.array, "rows draws"]:
    """Return where running sums [rows, 1 or draws, steps] first exceed the target; the last step if never."""
    count = mx.sum(running <= target[:, :, None], axis=2)
    return mx.minimum(count, running.shape[2] - 1).astype(mx.int32)
