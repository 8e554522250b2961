"""A linear layer on few rows, with what comes before and after it."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels import kernels, reference
from metal_kernels.checks import require_rows
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError
from metal_kernels.linear_weights import LinearWeights
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
    """Apply a linear layer, after a norm or before an activation or a sum.

    Args:
        rows: Of the input; if they are wider than the layer takes, the first elements of each.
        weights: Of the layer.
        norm: Weight of a root-mean-square norm (arXiv:1910.07467) of each row before the layer; None for no norm.
        eps: Added to the mean square.
        residual: Added to the outputs; not together with ``norm``.
        gated: Whether the first half of the outputs gate the second: ``silu(gate) * up`` (arXiv:2002.05202).

    Returns:
        The outputs, half as wide if ``gated``.

    Raises:
        MetalKernelsError: Shapes do not fit, or both ``norm`` and ``residual`` are given.
    """
    if norm is not None and residual is not None:
        raise MetalKernelsError("[fused_linear] expected norm or residual, got both. Add the residual separately.")
    if gated and weights.outputs % 2:
        raise MetalKernelsError(
            f"[fused_linear] expected an even number of gated outputs, got {weights.outputs}. Join gate and up."
        )
    width = weights.outputs // 2 if gated else weights.outputs
    _require_width("fused_linear", rows, weights.inputs)
    if norm is not None:
        require_rows("fused_linear", "norm", norm, (weights.inputs,))
    if residual is not None:
        require_rows("fused_linear", "residual", residual, (rows.shape[0], width))
    extra = norm if norm is not None else residual
    linear = kernels.linear_kernel(target(), rows.dtype, weights, rows.shape[0], normed=norm is not None, gated=gated)
    if rows.size and isinstance(linear, kernels.Accepted) and (extra is None or extra.dtype == rows.dtype):
        return kernels.fused_linear(rows, weights, linear.variant, norm=norm, eps=eps, residual=residual, gated=gated)
    return reference.fused_linear(rows, weights, norm=norm, eps=eps, residual=residual, gated=gated)


def head_linear(
    rows: Float[mx.array, "tokens heads row_size"], weights: StackedWeights
) -> Float[mx.array, "tokens heads outputs"]:
    """Apply a linear layer to each head of each row.

    Args:
        rows: Heads of the rows; if they are wider than the layers take, the first elements of each.
        weights: A layer for each head.

    Raises:
        MetalKernelsError: Shapes do not fit.
    """
    heads, _, inputs = weights.shape
    require_rows("head_linear", "rows", rows, (rows.shape[0], heads, rows.shape[2]))
    _require_width("head_linear", rows, inputs)
    linear = kernels.head_linear_kernel(target(), rows.dtype, weights, rows.shape[0])
    if rows.size and isinstance(linear, kernels.Accepted):
        return kernels.head_linear(rows, weights, linear.variant)
    return reference.head_linear(rows, weights)


def _require_width(operation: str, rows: mx.array, inputs: int) -> None:
    if rows.shape[-1] < inputs:
        raise MetalKernelsError(
            f"[{operation}] expected rows of at least {inputs} elements, got {rows.shape}. Pass the layer's own input."
        )
