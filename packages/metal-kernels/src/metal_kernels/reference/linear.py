"""A linear layer with what comes before and after it, with plain MLX operations."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.linear_weights import LinearWeights
from metal_kernels.reference.fused import silu_and_mul
from metal_kernels.stacked_weights import StackedWeights


def fused_linear(
    rows: Float[mx.array, "rows row_size"],
    weights: LinearWeights,
    *,
    norm: Float[mx.array, "inputs"] | None = None,
    eps: float = 0.0,
    residual: Float[mx.array, "rows width"] | None = None,
    gated: bool = False,
) -> Float[mx.array, "rows width"]:
    """Apply a linear layer; see :func:`metal_kernels.fused_linear`."""
    rows = rows[:, : weights.inputs]
    if norm is not None:
        rows = mx.fast.rms_norm(rows, norm, eps)
    if weights.bits is None or weights.scales is None:
        out = rows @ weights.weight.T
    else:
        out = mx.quantized_matmul(
            rows,
            weights.weight,
            weights.scales,
            weights.biases,
            transpose=True,
            group_size=weights.group_size,
            bits=weights.bits,
        )
    if weights.bias is not None:
        out = out + weights.bias
    if gated:
        out = silu_and_mul(out)
    return out if residual is None else residual + out


def head_linear(
    rows: Float[mx.array, "tokens heads row_size"], weights: StackedWeights
) -> Float[mx.array, "tokens heads outputs"]:
    """Apply a linear layer to each head; see :func:`metal_kernels.head_linear`."""
    heads = rows[..., : weights.shape[2]].swapaxes(0, 1)
    if weights.bits is None or weights.scales is None:
        out = heads @ weights.weight.swapaxes(1, 2)
    else:
        out = mx.quantized_matmul(
            heads,
            weights.weight,
            weights.scales,
            weights.biases,
            transpose=True,
            group_size=weights.group_size,
            bits=weights.bits,
        )
    return out.swapaxes(0, 1)
