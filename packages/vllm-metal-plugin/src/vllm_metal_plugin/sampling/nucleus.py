"""Which tokens min-p, top-k and top-p keep, as a bound that the weights of kept tokens exceed.

A cut is a value, never a list of tokens: tokens of equal weight stay together.
"""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Bool, Float, Int32

from vllm_metal_plugin.sampling.top_values import row_sum, top_values

WINDOW = 256
"""Heaviest tokens among which the edge of the nucleus is looked for first."""

NUM_DRAWS = 7
"""Tokens drawn at once where the edge lies beyond the window."""

_SAMPLE_COLUMNS = 768
_SAMPLE_MARGIN = 0.03

Weights = Float[mx.array, "rows vocab"]
PerRow = Float[mx.array, "rows one"]


def just_below(value: PerRow) -> PerRow:
    """Return the next smaller float32 of positive numbers; 0 stays 0."""
    return mx.view(mx.maximum(mx.view(value, mx.int32), 1) - 1, mx.float32)


def mass_above(weight: Weights, bound: PerRow) -> PerRow:
    """Return the total weight of the tokens heavier than ``bound``."""
    return row_sum(weight * (weight > bound))


def _mass_above_small(weight: Weights, bound: PerRow) -> PerRow:
    """Return ``mass_above`` for bounds far below the total, where it costs two thirds: no mask of floats."""
    not_above = mx.sum(weight <= bound, axis=1, keepdims=True)
    return row_sum(mx.maximum(weight, bound)) - bound * not_above


def top_k_bound(weight: Weights, top_k: Int32[mx.array, "rows one"], largest_k: int) -> PerRow:
    """Return the bound that keeps the ``top_k`` heaviest tokens and those equal to the last of them.

    Args:
        weight: Positive weights.
        top_k: A row that keeps everything holds the vocabulary size.
        largest_k: The largest ``top_k`` below the vocabulary size.
    """
    best = top_values(weight, largest_k)
    last = mx.take_along_axis(best, mx.minimum(top_k, largest_k) - 1, axis=1)
    return mx.where(top_k <= largest_k, just_below(last), 0.0)


def edge_bound(descending: Float[mx.array, "rows some"], target: PerRow) -> tuple[PerRow, Bool[mx.array, "rows one"]]:
    """Return the bound below the weight at which the running sum reaches ``target``, and whether it does."""
    index = mx.sum(mx.cumsum(descending, axis=1) < target, axis=1, keepdims=True)
    last = descending.shape[1] - 1
    return just_below(mx.take_along_axis(descending, mx.minimum(index, last), axis=1)), index <= last


class Nucleus(NamedTuple):
    """A bound for drawing, and what decides whether a drawn token belongs to the nucleus.

    Where ``exact`` is set the bound is the nucleus's own. Elsewhere it keeps a few tokens too many.
    """

    bound: PerRow
    exact: Bool[mx.array, "rows one"]
    target: PerRow

    def first_inside(
        self,
        weight: Weights,
        token_ids: Int32[mx.array, "rows draws"],
    ) -> Int32[mx.array, "rows one"]:
        """Return the first drawn token that belongs to the nucleus.

        A token belongs to it when the tokens heavier than itself do not reach the target. Heavier tokens
        belong if lighter ones do, so the draws are sorted and halved: three passes over the weights for
        seven draws. If none belongs (a chance of about 0.03**7), the heaviest is returned.
        """
        drawn = mx.take_along_axis(weight, token_ids, axis=1)
        ordered = mx.sort(drawn, axis=1)[:, ::-1]
        num_inside = mx.zeros(self.bound.shape, dtype=mx.int32)
        step = (NUM_DRAWS + 1) // 2
        while step:
            tried = mx.take_along_axis(ordered, num_inside + (step - 1), axis=1)
            inside = _mass_above_small(weight, tried) < self.target
            num_inside = num_inside + inside.astype(mx.int32) * step
            step //= 2
        lightest = mx.take_along_axis(ordered, mx.maximum(num_inside - 1, 0), axis=1)
        first = mx.argmax((drawn >= lightest) | self.exact, axis=1, keepdims=True)
        return mx.take_along_axis(token_ids, first, axis=1)


def nucleus(weight: Weights, total: PerRow, floor: PerRow, top_p: PerRow, *, sort: bool = False) -> Nucleus:
    """Return the smallest set of heaviest tokens whose weight reaches ``top_p`` of the total.

    The edge is looked for among the heaviest ``WINDOW`` tokens. A flatter distribution gets a bound that an
    even sample of the vocabulary suggests and one pass confirms; drawn tokens are then checked one by one
    (``Nucleus.first_inside``), which is exact and needs neither a sort of the vocabulary nor a result on the
    host. Both ways always run.

    Args:
        weight: As from ``weights``.
        total: Weight of the tokens heavier than ``floor``.
        floor: Bound left by min-p and top-k; lighter tokens count for nothing.
        top_p: In (0, 1]; rows at 1 keep everything above ``floor``.
        sort: Find every row's own bound by sorting the vocabulary, which is slow.
    """
    target = mx.where(top_p < 1.0, top_p * total, float("inf"))
    count = weight.shape[1] if sort else min(WINDOW, weight.shape[1])
    window = top_values(weight, count)
    bound, found = edge_bound(window * (window > floor), target)
    if count < weight.shape[1]:
        wide = _wide_bound(weight, floor, target, window)
        bound = mx.where(found, bound, wide)
    whole = top_p >= 1.0
    return Nucleus(mx.where(whole, floor, mx.maximum(bound, floor)), found | whole, target)


def _wide_bound(weight: Weights, floor: PerRow, target: PerRow, window: Float[mx.array, "rows window"]) -> PerRow:
    """Return a bound that keeps at least ``target`` and probably little more."""
    stride = max(1, weight.shape[1] // _SAMPLE_COLUMNS)
    sample = weight[:, ::stride]
    lightest = window[:, -1:]
    light = mx.sort(sample * (sample <= lightest), axis=1)[:, ::-1]
    running = mx.cumsum(light, axis=1)
    share = (target - mx.sum(window, axis=1, keepdims=True)) / stride + _SAMPLE_MARGIN * running[:, -1:]
    index = mx.minimum(mx.sum(running < share, axis=1, keepdims=True), light.shape[1] - 1)
    guess = just_below(mx.take_along_axis(light, index, axis=1))
    return mx.where(_mass_above_small(weight, guess) >= target, guess, floor)
