"""A linear layer on few rows, with what comes before and after it."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.kernels.dispatch import LinearVariant
from metal_kernels.kernels.source import PortableKernel, constants
from metal_kernels.linear_weights import LinearWeights
from metal_kernels.stacked_weights import StackedWeights

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
    rows: Float[mx.array, "rows row_size"],
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
        rows: At most as many as ``variant`` has columns for, of which the first elements are multiplied.
        weights: Of the layer.
        variant: From :func:`metal_kernels.kernels.linear_kernel`.
        norm: Weight of the norm before it.
        eps: Of that norm.
        residual: Added to the outputs; not with ``norm``.
        gated: Whether half of the outputs gate the others.
    """
    nothing = constants(0.0)
    extra = norm if norm is not None else residual
    others = [
        nothing.astype(rows.dtype) if extra is None else extra,
        nothing if weights.bias is None else weights.bias,
        constants(eps),
    ]
    template: dict[str, int | mx.Dtype] = {
        "NORM": norm is not None,
        "ADDED": residual is not None,
        "GATED": gated,
        "BIAS": weights.bias is not None,
    }
    return _launch(rows, weights, (1, weights.outputs, weights.inputs), others, variant, template)


def head_linear(
    rows: Float[mx.array, "tokens heads row_size"], weights: StackedWeights, variant: LinearVariant
) -> Float[mx.array, "tokens heads outputs"]:
    """Apply a linear layer to each head; see :func:`metal_kernels.head_linear`.

    Args:
        rows: Of at most as many tokens as ``variant`` has columns for.
        weights: Of each head.
        variant: From :func:`metal_kernels.kernels.head_linear_kernel`.
    """
    heads, outputs, _ = weights.shape
    nothing = constants(0.0)
    others = [nothing.astype(rows.dtype), nothing, nothing]
    template: dict[str, int | mx.Dtype] = dict.fromkeys(("NORM", "ADDED", "GATED", "BIAS"), False)
    out = _launch(rows, weights, weights.shape, others, variant, template)
    return out.reshape(rows.shape[0], heads, outputs)


def _launch(
    rows: mx.array,
    weights: LinearWeights | StackedWeights,
    shape: tuple[int, int, int],
    others: list[mx.array],
    variant: LinearVariant,
    template: dict[str, int | mx.Dtype],
) -> mx.array:
    heads, outputs, inputs = shape
    width = outputs // 2 if template["GATED"] else outputs
    template |= {
        "T": rows.dtype,
        "HEADS": heads,
        "ROW": rows.shape[-1],
        "INPUT": inputs,
        "OUTPUT": width,
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
        [rows, *packed, *others],
        [((rows.shape[0], heads * width), rows.dtype)],
        threadgroups=(outputs // (16 * variant.tiles), heads),
        threads=variant.simdgroups * 32,
        template=template,
    )
    return out
