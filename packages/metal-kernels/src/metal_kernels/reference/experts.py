"""Feed-forward parts of experts with plain MLX operations."""

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32


def choose_experts(
    logits: Float[mx.array, "tokens experts"], chosen: int, *, normalised: bool
) -> tuple[Int32[mx.array, "tokens chosen"], Float[mx.array, "tokens chosen"]]:
    """Choose experts; see :func:`metal_kernels.choose_experts`."""
    weights = mx.softmax(logits.astype(mx.float32), axis=-1)
    experts = mx.argsort(-weights, axis=-1)[:, :chosen]
    scores = mx.take_along_axis(weights, experts, axis=-1)
    if normalised:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return experts.astype(mx.int32), scores


def expert_silu_and_mul(
    rows: Float[mx.array, "tokens hidden"],
    gate: Float[mx.array, "experts width inputs"],
    up: Float[mx.array, "experts width inputs"],
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
    weight: Float[mx.array, "experts hidden inputs"],
    experts: Int32[mx.array, "tokens chosen"],
    scores: Float[mx.array, "tokens chosen"],
) -> Float[mx.array, "tokens chosen hidden"]:
    """Multiply rows; see :func:`metal_kernels.expert_linear`."""
    out = _multiplied(rows.reshape(-1, rows.shape[2]), weight, experts).reshape(*experts.shape, -1)
    return out * scores[..., None].astype(mx.float32)


def _multiplied(pairs: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    """Multiply each row with the weight of its expert, in float32."""
    chosen = weight[experts.reshape(-1)].astype(mx.float32)
    return (chosen @ pairs.astype(mx.float32)[:, :, None]).squeeze(2)
