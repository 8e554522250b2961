"""A linear layer on few rows, with what comes before and after it."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.kernels.dispatch import LinearVariant
from metal_kernels.kernels.source import PortableKernel, constants
from metal_kernels.linear_weights import LinearWeights

_BODY = "fused_linear.metal"
_HEADERS = ("words", "bits", "matrix", "runs")
_OTHERS = ("extra_in", "bias_in", "factors_in")
_PLAIN = PortableKernel(
    "fused_linear", ("rows_in", "weight_in", *_OTHERS), ("out",), _BODY, "#define QUANTIZED 0\n", True, _HEADERS
)
_QUANTIZED = PortableKernel(
    "fused_linear_quantized",
    ("rows_in", "weight_in", "scales_in", "biases_in", *_OTHERS),
    ("out",),
    _BODY,
    "#define QUANTIZED 1\n",
    True,
    _HEADERS,
)


def fused_linear(
    rows: Float[mx.array, "rows inputs"],
    weights: LinearWeights,
    variant: LinearVariant,
    *,
    norm: Float[mx.array, "inputs"] | None = None,
    eps: float = 0.0,
    residual: Float[mx.array, "rows width"] | None = None,
    gated: bool = False,
) -> Float[mx.array, "rows width"]:
    """Apply a linear layer; see :func:`metal_kernels.fused_linear`.

    Args:
        rows: At most as many as ``variant`` has columns for.
        weights: Of the layer.
        variant: From :func:`metal_kernels.kernels.linear_kernel`.
        norm: Weight of the norm before it.
        eps: Of that norm.
        residual: Added to the outputs; not with ``norm``.
        gated: Whether half of the outputs gate the others.
    """
    nothing = constants(0.0)
    extra = norm if norm is not None else residual
    width = weights.outputs // 2 if gated else weights.outputs
    inputs = [
        nothing.astype(rows.dtype) if extra is None else extra,
        nothing if weights.bias is None else weights.bias,
        constants(eps),
    ]
    template: dict[str, int | mx.Dtype] = {
        "T": rows.dtype,
        "INPUT": weights.inputs,
        "OUTPUT": width,
        "NORM": norm is not None,
        "ADDED": residual is not None,
        "GATED": gated,
        "BIAS": weights.bias is not None,
        "TILES": variant.tiles,
        "COLUMNS": variant.columns,
        "SIMDGROUPS": variant.simdgroups,
        "DEPTH": variant.depth,
    }
    kernel, packed = _PLAIN, [weights.weight]
    if weights.scales is not None and weights.biases is not None and weights.bits is not None:
        kernel, packed = _QUANTIZED, [weights.weight, weights.scales, weights.biases]
        template |= {"BITS": weights.bits, "GROUP_SIZE": weights.group_size}
    (out,) = kernel(
        [rows, *packed, *inputs],
        [((rows.shape[0], width), rows.dtype)],
        threadgroups=(weights.outputs // (16 * variant.tiles), 1),
        threads=variant.simdgroups * 32,
        template=template,
    )
    return out
