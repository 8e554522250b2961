"""Temperature, min-p, top-k, top-p and the draw, for rows that are not greedy."""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int32

from vllm_metal_plugin.sampling.draw import draw, weights
from vllm_metal_plugin.sampling.nucleus import (
    NUM_DRAWS,
    WINDOW,
    edge_bound,
    just_below,
    mass_above,
    nucleus,
    top_k_bound,
)
from vllm_metal_plugin.sampling.step_plan import RandomRows
from vllm_metal_plugin.sampling.top_values import row_sum, top_tokens

Table = Float[mx.array, "rows vocab"]
Uniform = Float[mx.array, "rows draws"]


class Drawn(NamedTuple):
    """Tokens, and the logits they were drawn from: divided by the temperature, -inf for what was cut."""

    token_ids: Int32[mx.array, "rows"]
    logits: Table


def draw_narrow(logits: Table, uniform: Uniform, rows: RandomRows, *, exact_logits: bool) -> Drawn:
    """Sample rows that all have a small top_k from their best ``WINDOW`` tokens.

    Args:
        logits: float32.
        uniform: The rows' uniform numbers; the first is used.
        rows: Parameters; ``largest_k`` is at most half of ``WINDOW``, which leaves room for ties.
        exact_logits: As in ``draw_wide``; here the reported logits are exact either way.
    """
    assert rows.top_k is not None
    token_ids = top_tokens(logits, min(WINDOW, logits.shape[1]))
    best = mx.take_along_axis(logits, token_ids, axis=1)
    temperature = 1.0 if rows.inverse_temperature is None else rows.inverse_temperature
    weight = mx.exp((best - mx.maximum(best[:, :1], -1e30)) * temperature)
    bound = just_below(mx.take_along_axis(weight, rows.top_k - 1, axis=1))
    if rows.min_p_floor is not None:
        bound = mx.maximum(bound, rows.min_p_floor)
    if rows.top_p is not None:
        kept = weight * (weight > bound)
        target = rows.top_p * mx.sum(kept, axis=1, keepdims=True)
        cut = mx.maximum(edge_bound(kept, target)[0], bound)
        bound = mx.where(rows.top_p < 1.0, cut, bound)
    keep = weight > bound
    index = draw(weight * keep, uniform[:, :1])
    lightest = mx.min(mx.where(keep, best, float("inf")), axis=1, keepdims=True)
    reported = mx.where(logits >= lightest, logits * temperature, -float("inf"))
    return Drawn(mx.take_along_axis(token_ids, index, axis=1)[:, 0], reported)


def draw_wide(logits: Table, uniform: Uniform, rows: RandomRows, *, exact_logits: bool) -> Drawn:
    """Sample rows from the whole vocabulary.

    Args:
        logits: float32.
        uniform: The rows' uniform numbers.
        rows: Parameters.
        exact_logits: The logits will be reported, so that the edge of every nucleus has to be known.
    """
    weight = weights(logits, rows.inverse_temperature)
    bound = mx.zeros_like(uniform[:, :1]) if rows.min_p_floor is None else rows.min_p_floor
    if rows.top_k is not None:
        bound = mx.maximum(bound, top_k_bound(weight, rows.top_k, rows.largest_k))
    cut = rows.min_p_floor is not None or rows.top_k is not None
    if rows.top_p is None:
        token_ids = draw(weight * (weight > bound) if cut else weight, uniform[:, :1])
    else:
        total = mass_above(weight, bound) if cut else row_sum(weight)
        core = nucleus(weight, total, bound, rows.top_p, sort=exact_logits)
        bound = core.bound
        token_ids = core.first_inside(weight, draw(weight * (weight > bound), uniform[:, :NUM_DRAWS]))
    scaled = logits if rows.inverse_temperature is None else logits * rows.inverse_temperature
    return Drawn(token_ids[:, 0], mx.where(weight > bound, scaled, -float("inf")))
