"""Feed-forward parts of experts with plain MLX operations."""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32

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
    """Choose experts; see :func:`metal_kernels.choose_experts`."""
    numbers = logits.astype(mx.float32)
    weights = mx.softmax(numbers, axis=-1) if sigmoid_bias is None else mx.sigmoid(numbers)
    ranked = weights if sigmoid_bias is None else weights + sigmoid_bias.astype(mx.float32)
    if groups > kept_groups:
        of_group = mx.sort(ranked.reshape(len(ranked), groups, -1), axis=-1)
        of_group = of_group[..., -1 if sigmoid_bias is None else -2 :].sum(axis=-1)
        rank = mx.argsort(mx.argsort(-of_group, axis=-1), axis=-1)
        kept = mx.repeat(rank < kept_groups, ranked.shape[1] // groups, axis=-1)
        ranked = mx.where(kept, ranked, 0.0)
    experts = mx.argsort(-ranked, axis=-1)[:, :chosen]
    scores = mx.take_along_axis(weights, experts, axis=-1)
    if normalised:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return experts.astype(mx.int32), scores * scale


def expert_silu_and_mul(
    rows: Float[mx.array, "tokens hidden"],
    gate: StackedWeights,
    up: StackedWeights,
    experts: Int32[mx.array, "tokens chosen"],
) -> Float[mx.array, "tokens chosen width"]:
    """Multiply and gate rows; see :func:`metal_kernels.expert_silu_and_mul`."""
    tokens, chosen = experts.shape
    pairs = mx.repeat(rows, chosen, axis=0)
    gates, ups = (_multiplied(pairs, weight, experts) for weight in (gate, up))
    gated: mx.array = nn.silu(gates) * ups
    return gated.astype(rows.dtype).reshape(tokens, chosen, -1)


def expert_linear(
    rows: Float[mx.array, "tokens chosen width"],
    weight: StackedWeights,
    experts: Int32[mx.array, "tokens chosen"],
    scores: Float[mx.array, "tokens chosen"],
) -> Float[mx.array, "tokens chosen hidden"]:
    """Multiply rows; see :func:`metal_kernels.expert_linear`."""
    out = _multiplied(rows.reshape(-1, rows.shape[2]), weight, experts).reshape(*experts.shape, -1)
    return out * scores[..., None].astype(mx.float32)


def _multiplied(pairs: mx.array, weights: StackedWeights, experts: mx.array) -> mx.array:
    """Multiply each row with the weight of its expert, in float32."""
    ids = experts.reshape(-1)
    chosen = weights.weight[ids]
    if weights.bits is not None and weights.scales is not None and weights.biases is not None:
        scales, biases = weights.scales[ids], weights.biases[ids]
        chosen = mx.dequantize(chosen, scales, biases, group_size=weights.group_size, bits=weights.bits)
    return (chosen.astype(mx.float32) @ pairs.astype(mx.float32)[:, :, None]).squeeze(2)
