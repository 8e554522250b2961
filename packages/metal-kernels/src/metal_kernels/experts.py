"""Feed-forward parts of experts, for steps of few rows."""

from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels import kernels, reference
from metal_kernels.checks import require_rows
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError
from metal_kernels.stacked_weights import StackedWeights


def choose_experts(
    logits: Float[mx.array, "tokens experts"],
    chosen: int,
    *,
    normalised: bool,
    sigmoid_bias: Float[mx.array, "experts"] | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Int32[mx.array, "tokens chosen"], Float[mx.array, "tokens chosen"]]:
    """Return the experts of each row with the largest scores, and their weights.

    Args:
        logits: What a router made of the rows.
        chosen: How many experts of each row.
        normalised: Whether the weights are divided by their sum.
        sigmoid_bias: Scores are sigmoids plus these, weights the sigmoids (DeepSeek-V3, arXiv:2412.19437). None:
            weights and scores are the softmax.
        groups: Neighbouring experts are of one of so many groups.
        kept_groups: How many groups of each row keep their scores; others' become zero. Groups are ranked by their
            highest score, with ``sigmoid_bias`` by the sum of the two highest.
        scale: Factor of the weights.

    Raises:
        MetalKernelsError: More experts are to be chosen than there are, or groups are not of one size.
    """
    experts = logits.shape[1]
    if not 0 < chosen <= experts:
        raise MetalKernelsError(
            f"[choose_experts] expected to choose 1 to {experts} experts, got {chosen}. Check the model's config."
        )
    if experts % groups or not 0 < kept_groups <= groups:
        raise MetalKernelsError(
            f"[choose_experts] expected equal groups of {experts} experts, some of which are kept, got {groups} and "
            f"{kept_groups}. Check the model's config."
        )
    routed = logits.shape[0] and isinstance(kernels.routing_kernel(target(), logits.dtype, experts), kernels.Accepted)
    choose = kernels.choose_experts if routed else reference.choose_experts
    return choose(
        logits,
        chosen,
        normalised=normalised,
        sigmoid_bias=sigmoid_bias,
        groups=groups,
        kept_groups=kept_groups,
        scale=scale,
    )


def expert_silu_and_mul(
    rows: Float[mx.array, "tokens hidden"],
    gate: StackedWeights,
    up: StackedWeights,
    experts: Int32[mx.array, "tokens chosen"],
) -> Float[mx.array, "tokens chosen width"]:
    """Return ``silu(gate(row)) * up(row)`` of each row for each of its experts.

    Weights are read once for rows that chose the same expert; the product is taken in float32.

    Args:
        rows: Rows of the step.
        gate: Weights of all experts whose products pass through the SiLU.
        up: Weights whose products they gate; as ``gate`` in shape and kind.
        experts: Each row's experts, all different.

    Raises:
        MetalKernelsError: Shapes do not fit together.
    """
    _require("expert_silu_and_mul", rows.shape[1], gate)
    require_rows("expert_silu_and_mul", "up", up.weight, gate.weight.shape)
    require_rows("expert_silu_and_mul", "experts", experts, (rows.shape[0], experts.shape[1]))
    variant = _variant(rows.dtype, gate, experts, gated=True)
    if isinstance(variant, kernels.ExpertMatrixVariant):
        return kernels.expert_matrix(rows, gate, up, experts, None, variant)
    if variant is not None:
        return kernels.expert_silu_and_mul(rows, gate.weight, up.weight, experts, variant)
    return reference.expert_silu_and_mul(rows, gate, up, experts)


def expert_linear(
    rows: Float[mx.array, "tokens chosen width"],
    weight: StackedWeights,
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
    variant = _variant(rows.dtype, weight, experts, gated=False)
    if isinstance(variant, kernels.ExpertMatrixVariant):
        return kernels.expert_matrix(rows.reshape(-1, rows.shape[2]), weight, None, experts, scores, variant)
    if variant is not None:
        return kernels.expert_linear(rows, weight.weight, experts, scores, variant)
    return reference.expert_linear(rows, weight, experts, scores)


def serves_experts(dtype: mx.Dtype, weights: Sequence[StackedWeights], tokens: int, chosen: int) -> bool:
    """Whether kernels compute a step of so many rows; MLX's grouped matmuls are faster than what does it else.

    Args:
        dtype: Of the rows.
        weights: Gate, up and down.
        tokens: Rows of the step.
        chosen: Experts of each row.
    """
    gate, up, down = weights
    return all(
        _kernel(dtype, weight, tokens, chosen, gated=gated) is not None
        for weight, gated in ((gate, True), (up, True), (down, False))
    )


def _variant(
    dtype: mx.Dtype, weights: StackedWeights, experts: mx.array, *, gated: bool
) -> kernels.ExpertVariant | kernels.ExpertMatrixVariant | None:
    return _kernel(dtype, weights, *experts.shape, gated=gated)


def _kernel(
    dtype: mx.Dtype, weights: StackedWeights, tokens: int, chosen: int, *, gated: bool
) -> kernels.ExpertVariant | kernels.ExpertMatrixVariant | None:
    """Return the layout of what computes so many rows: matrix units where it knows them, else vectors."""
    matrix = kernels.expert_matrix_kernel(target(), dtype, weights, tokens, chosen, gated=gated)
    if isinstance(matrix, kernels.Accepted):
        return matrix.variant
    vectors = kernels.expert_kernel(target(), dtype, weights.weight.dtype, weights.weight.shape, tokens)
    return vectors.variant if isinstance(vectors, kernels.Accepted) else None


def _require(operation: str, size: int, weights: StackedWeights) -> None:
    if weights.shape[2] != size:
        raise MetalKernelsError(
            f"[{operation}] expected weights for rows of {size} elements, got {weights.shape}. "
            "Stack the experts' weights, a row for each output."
        )
