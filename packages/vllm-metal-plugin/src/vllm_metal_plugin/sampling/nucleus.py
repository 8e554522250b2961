"""Which tokens min-p, top-k and top-p keep, as bounds on the tokens' weights.

Every cut is a value, never a list of tokens: a token is kept when its weight lies in ``(above, upto]``.
Tokens of equal weight therefore stay together, except at the edge of top-p, where equal tokens that only
partly fit share the room that is left (as if ties were broken at random at every draw).
"""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float

from vllm_metal_plugin.sampling.top_values import row_sum, top_values

_WINDOW = 256
_SAMPLE_COLUMNS = 768
_SECANT_STEPS = 4
_INF = float("inf")

Weights = Float[mx.array, "rows vocab"]
PerRow = Float[mx.array, "rows one"]


class Slice(NamedTuple):
    """Keep weights in ``(above, upto]`` and spread the draw's uniform number over them."""

    above: PerRow
    upto: PerRow
    uniform: PerRow

    def apply(self, weight: Weights) -> Weights:
        """Return ``weight`` with everything outside the bounds at 0."""
        return weight * ((weight > self.above) & (weight <= self.upto))


def just_below(value: PerRow) -> PerRow:
    """Return the next smaller float32 of positive numbers; 0 stays below every weight."""
    return mx.view(mx.maximum(mx.view(value, mx.int32), 1) - 1, mx.float32)


def mass_above(weight: Weights, bound: PerRow) -> PerRow:
    """Return the total weight of the tokens heavier than ``bound``."""
    return row_sum(weight * (weight > bound))


def top_k_bound(weight: Weights, top_k: mx.array, largest_k: int) -> PerRow:
    """Return the bound that keeps the ``top_k`` heaviest tokens and those equal to the last of them.

    Args:
        weight: Positive weights.
        top_k: int32 [rows, 1]; a row that keeps everything holds the vocabulary size.
        largest_k: The largest ``top_k`` below the vocabulary size.
    """
    best = top_values(weight, largest_k)
    last = mx.take_along_axis(best, mx.minimum(top_k, largest_k) - 1, axis=1)
    return mx.where(top_k <= largest_k, just_below(last), 0.0)


class _Bracket(NamedTuple):
    """``mass_above(high) < target <= mass_above(low)``; only the end next to the answer has a known mass."""

    low: PerRow
    high: PerRow
    mass_low: PerRow
    mass_high: PerRow

    def narrow(self, weight: Weights, bound: PerRow, target: PerRow) -> "_Bracket":
        """Replace the end on the same side as ``bound``."""
        bound = mx.clip(bound, self.low, self.high)
        mass = mass_above(weight, bound)
        enough = mass >= target
        return _Bracket(
            mx.where(enough, bound, self.low),
            mx.where(enough, self.high, bound),
            mx.where(enough, mass, self.mass_low),
            mx.where(enough, self.mass_high, mass),
        )

    def secant(self, target: PerRow) -> PerRow:
        """Guess the answer, taking the mass as linear in the logarithm of the bound."""
        share = (target - self.mass_high) / mx.maximum(self.mass_low - self.mass_high, 1e-30)
        high, low = mx.log(mx.maximum(self.high, 1e-37)), mx.log(mx.maximum(self.low, 1e-37))
        return mx.exp(high + mx.clip(share, 0.02, 0.98) * (low - high))


def _sampled_quantiles(weight: Weights, bracket: _Bracket, target: PerRow) -> tuple[PerRow, PerRow]:
    """Guess bounds on both sides of the answer from an even sample of the vocabulary."""
    stride = max(1, weight.shape[1] // _SAMPLE_COLUMNS)
    sample = weight[:, ::stride]
    sample = mx.sort(sample * ((sample > bracket.low) & (sample <= bracket.high)), axis=1)[:, ::-1]
    running = mx.cumsum(sample, axis=1)
    share = (target - bracket.mass_high) / stride
    spread = 0.03 * running[:, -1:]

    def at(mass: PerRow) -> PerRow:
        index = mx.minimum(mx.sum(running < mass, axis=1, keepdims=True), sample.shape[1] - 1)
        return mx.take_along_axis(sample, index, axis=1)

    return at(share - spread), at(share + spread)


def _search(weight: Weights, target: PerRow, bracket: _Bracket) -> _Bracket:
    """Close in on the bound above which ``target`` lies, in a fixed number of passes over the weights."""
    for guess in _sampled_quantiles(weight, bracket, target):
        bracket = bracket.narrow(weight, guess, target)
    for _ in range(_SECANT_STEPS):
        bracket = bracket.narrow(weight, bracket.secant(target), target)
    return bracket


class _Edge(NamedTuple):
    """The last weights that fit: ``(low, high]``, of which ``room`` fits after ``mass_high`` above them."""

    low: PerRow
    high: PerRow
    mass_high: PerRow
    room: PerRow
    found: mx.array


def _edge_in(window: Weights, mass_before: PerRow, target: PerRow) -> _Edge:
    """Find the edge among weights sorted from heavy to light, ``mass_before`` lying above the first."""
    running = mass_before + mx.cumsum(window, axis=1)
    index = mx.sum(running < target, axis=1, keepdims=True)
    value = mx.take_along_axis(window, mx.minimum(index, window.shape[1] - 1), axis=1)
    above = mass_before + mx.sum(window * (window > value), axis=1, keepdims=True)
    room = mx.maximum(mx.ceil((target - above) / mx.maximum(value, 1e-37)), 1.0) * value
    return _Edge(just_below(value), value, above, room, index < window.shape[1])


def _choose(condition: mx.array, first: _Edge, second: _Edge) -> _Edge:
    return _Edge(*(mx.where(condition, a, b) for a, b in zip(first, second, strict=True)))


def top_p_slice(
    weight: Weights, total: PerRow, floor: PerRow, top_p: PerRow, uniform: PerRow
) -> tuple[Slice, PerRow]:
    """Return the part of the nucleus that the uniform number falls into, and the bound of the whole nucleus.

    The nucleus is the smallest set of heaviest tokens whose weight reaches ``top_p * total``. Its edge is
    looked for among the 256 heaviest tokens; for flat distributions, whose nucleus is larger, a bracketing
    search over the whole vocabulary leads to the 256 tokens around the edge. Both always run: nothing waits
    for a result. Should the edge not be among those, the tokens in the bracket (about 1e-3 of the mass) are
    kept with equally reduced weights, so that the total is still right.

    Args:
        weight: Largest entry 1, as of ``weights``.
        total: Weight of the tokens heavier than ``floor``.
        floor: Bound left by min-p and top-k.
        top_p: In (0, 1].
        uniform: The draw's uniform numbers.
    """
    target = top_p * total
    window = top_values(weight, min(_WINDOW, weight.shape[1]))
    window = window * (window > floor)
    edge = _edge_in(window, mx.zeros_like(total), target)
    if window.shape[1] < weight.shape[1]:
        lightest = (1.0 - top_p) * total * (0.9999 / weight.shape[1])
        last = window[:, -1:]
        heavier = mx.sum(window * (window > last), axis=1, keepdims=True)
        bracket = _search(weight, target, _Bracket(mx.maximum(floor, lightest), last, total, heavier))
        around = top_values(weight * (weight <= bracket.high) * (weight > floor), window.shape[1])
        found = _edge_in(around, bracket.mass_high, target)
        rest = _Edge(bracket.low, bracket.high, bracket.mass_high, target - bracket.mass_high, found.found)
        edge = _choose(edge.found, edge, _choose(found.found, found, rest))
    inside = row_sum(weight * ((weight > edge.low) & (weight <= edge.high)))
    room = mx.minimum(edge.room, inside)
    place = uniform * (edge.mass_high + room)
    heavy = place < edge.mass_high
    whole = top_p >= 1.0
    return Slice(
        mx.where(whole, floor, mx.where(heavy, edge.high, edge.low)),
        mx.where(whole | heavy, _INF, edge.high),
        mx.where(
            whole,
            uniform,
            mx.where(heavy, place, place - edge.mass_high) / mx.where(heavy, edge.mass_high, room),
        ),
    ), mx.where(whole, floor, edge.low)
