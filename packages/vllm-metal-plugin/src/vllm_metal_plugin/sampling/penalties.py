"""Repetition, frequency and presence penalties."""

import mlx.core as mx
from jaxtyping import Float

PerRow = Float[mx.array, "rows one"]
Table = Float[mx.array, "rows vocab"]


def apply_repetition_penalty(logits: Table, history: Table, penalty: PerRow, *, one_sided: bool) -> Table:
    """Divide positive and multiply negative logits of tokens that occurred by ``penalty``.

    Args:
        logits: float32.
        history: Positive where the token occurs in the prompt or the output.
        penalty: Positive; 1 leaves a row as it is.
        one_sided: No penalty is below 1, so that one comparison does.

    Source: Keskar et al., *CTRL*, section 4.1.
    """
    scale = mx.where(history > 0.0, penalty, 1.0)
    divided, multiplied = logits / scale, logits * scale
    smaller = mx.minimum(divided, multiplied)
    if one_sided:
        return smaller
    return mx.where(penalty >= 1.0, smaller, mx.maximum(divided, multiplied))


def apply_frequency_penalty(logits: Table, history: Table, penalty: PerRow) -> Table:
    """Subtract ``penalty`` once for every time the token was emitted: the whole part of its history."""
    return logits - mx.floor(history) * penalty


def apply_presence_penalty(logits: Table, history: Table, penalty: PerRow) -> Table:
    """Subtract ``penalty`` from every token that was emitted."""
    return logits - (history >= 1.0) * penalty
