"""Feed-forward parts of experts, for steps of few rows."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_rows
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError


def choose_experts(
    logits: Float[mx.array, "tokens experts"], chosen: int, *, normalised: bool
) -> tuple[Int32[mx.array, "tokens chosen"], Float[mx.array, "tokens chosen"]]:
    """Return the experts of each row with the largest softmax, and their share of it.

    Args:
        logits: What a router made of the rows.
        chosen: How many experts of each row.
        normalised: Whether the shares are divided by their sum.

    Raises:
        MetalKernelsError: More experts are to be chosen than there are.
    """
    if not 0 < chosen <= logits.shape[1]:
        raise MetalKernelsError(
            f"[choose_experts] expected to choose 1 to {logits.shape[1]} experts, got {chosen}. "
            "Check the model's config."
        )
    if logits.shape[0] and isinstance(
        kernels.routing_kernel(target(), logits.dtype, logits.shape[1]), kernels.Accepted
    ):
        return kernels.choose_experts(logits, chosen, normalised=normalised)
    return reference.choose_experts(logits, chosen, normalised=normalised)


def expert_silu_and_mul(
    rows: Float[mx.array, "tokens hidden"],
    gate: Float[mx.array, "experts width inputs"],
    up: Float[mx.array, "experts width inputs"],
    experts: Int32[mx.array, "tokens chosen"],
) -> Float[mx.array, "tokens chosen width"]:
    """Return ``silu(gate(row)) * up(row)`` of each row for each of its experts.

    Weights are read once for rows that chose the same expert; the product is taken in float32.

    Args:
        rows: Rows of the step.
        gate: Weights of all experts whose products pass through the SiLU.
        up: Weights whose products they gate.
        experts: Each row's experts, all different.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    _require("expert_silu_and_mul", rows.shape[1], gate)
    require_rows("expert_silu_and_mul", "up", up, gate.shape)
    require_rows("expert_silu_and_mul", "experts", experts, (rows.shape[0], experts.shape[1]))
    linear = kernels.expert_kernel(target(), rows.dtype, gate.dtype, gate.shape, rows.shape[0])
    if isinstance(linear, kernels.Accepted):
        return kernels.expert_silu_and_mul(rows, gate, up, experts, linear.variant)
    return reference.expert_silu_and_mul(rows, gate, up, experts)


def expert_linear(
    rows: Float[mx.array, "tokens chosen width"],
    weight: Float[mx.array, "experts hidden inputs"],
    experts: Int32[mx.array, "tokens chosen"],
    scores: Float[mx.array, "tokens chosen"],
) -> Float[mx.array, "tokens chosen hidden"]:
    """Return what each row's experts make of a row of its own, times a score, in float32.

    Args:
        rows: A row for each token and expert.
        weight: Weights of all experts.
        experts: Each token's experts, all different.
        scores: Factors of the products.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    _require("expert_linear", rows.shape[2], weight)
    require_rows("expert_linear", "experts", experts, rows.shape[:2])
    require_rows("expert_linear", "scores", scores, rows.shape[:2])
    linear = kernels.expert_kernel(target(), rows.dtype, weight.dtype, weight.shape, rows.shape[0])
    if isinstance(linear, kernels.Accepted):
        return kernels.expert_linear(rows, weight, experts, scores, linear.variant)
    return reference.expert_linear(rows, weight, experts, scores)


def _require(operation: str, size: int, weight: mx.array) -> None:
    if weight.shape[2] != size:
        raise MetalKernelsError(
            f"[{operation}] expected weights for rows of {size} elements, got {weight.shape}. "
            "Stack the experts' weights, a row for each output."
        )
