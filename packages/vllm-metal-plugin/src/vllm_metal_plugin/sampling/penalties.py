"""Repetition, frequency and presence penalties."""

import mlx.core as mx
from jaxtyping import Float

PerRow = Float[mx.array, "rows one"]
Table = Float[mx.array, "rows vocab"]


def apply_repetition_penalty(logits: Table, seen: Table, penalty: PerRow, *, one_sided: bool) -> Table:
    """Divide positive and multiply negative logits of tokens that occurred by ``penalty``.

    Args:
        logits: float32.
        seen: 1 where the token occurs in the prompt or the output, else 0.
        penalty: Positive; 1 leaves a row as it is.
        one_sided: No penalty is below 1, so that one comparison does.

    Source: Keskar et al., *CTRL*, section 4.1.
    """
    scale = seen * (penalty - 1.0) + 1.0
    divided, multiplied = logits / scale, logits * scale
    smaller = mx.minimum(divided, multiplied)
    if one_sided:
        return smaller
    return mx.where(penalty >= 1.0, smaller, mx.maximum(divided, multiplied))


def apply_frequency_penalty(logits: Table, counts: Table, penalty: PerRow) -> Table:
    """Subtract ``penalty`` once for every time the token was emitted."""
    return logits - counts * penalty


def apply_presence_penalty(logits: Table, counts: Table, penalty: PerRow) -> Table:
    """Subtract ``penalty`` from every token that was emitted."""
    return logits - mx.minimum(counts, 1.0) * penalty
