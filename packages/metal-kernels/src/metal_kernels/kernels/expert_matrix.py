"""Feed-forward parts of experts on matrix units, for steps in which rows share experts."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.dispatch.expert_matrix import MOST_ROWS, ExpertMatrixVariant
from metal_kernels.kernels.source import PortableKernel, constants
from metal_kernels.stacked_weights import StackedWeights

_BODY = "expert_matrix.metal"
_HEADERS = ("words", "bits", "matrix", "runs", "expert_pairs")
_OTHERS = ("experts_in", "scores_in")
_PLAIN = PortableKernel(
    "expert_matrix",
    ("rows_in", "weight_in", "up_in", *_OTHERS),
    ("out",),
    _BODY,
    "#define QUANTIZED 0\n",
    True,
    _HEADERS,
)
_PACKED = tuple(f"{name}{array}_in" for name in ("weight", "up") for array in ("", "_scales", "_biases"))
_QUANTIZED = PortableKernel(
    "expert_matrix_quantized",
    ("rows_in", *_PACKED, *_OTHERS),
    ("out",),
    _BODY,
    "#define QUANTIZED 1\n",
    True,
    _HEADERS,
)


def expert_matrix(
    rows: Float[mx.array, "rows inputs"],
    weights: StackedWeights,
    up: StackedWeights | None,
    experts: Int32[mx.array, "tokens chosen"],
    scores: Float[mx.array, "tokens chosen"] | None,
    variant: ExpertMatrixVariant,
) -> Float[mx.array, "tokens chosen outputs"]:
    """Multiply each row with the weights of its experts.

    Args:
        rows: One for each token if ``up`` is given, else one for each pair of token and expert.
        weights: Of all experts.
        up: Weights whose products those of ``weights`` gate.
        experts: Each token's experts, all different.
        scores: Factors of products that are not gated; those are in float32.
        variant: From :func:`metal_kernels.kernels.expert_matrix_kernel`.
    """
    tokens, chosen = experts.shape
    count, outputs, inputs = weights.shape
    pairs = padded_pairs(experts)
    dtype = rows.dtype if up is not None else mx.float32
    width = variant.tiles * (8 if up is not None else 16)
    template: dict[str, int | mx.Dtype] = {
        "T": rows.dtype,
        "O": dtype,
        "INPUT": inputs,
        "OUTPUT": outputs,
        "PAIRS_PER_ROW": chosen if up is not None else 1,
        "GATED": up is not None,
        "MOST_ROWS": MOST_ROWS,
        "TILES": variant.tiles,
        "COLUMNS": variant.columns,
        "SIMDGROUPS": variant.simdgroups,
        "DEPTH": variant.depth,
    }
    kernel = _PLAIN
    if weights.bits is not None:
        kernel = _QUANTIZED
        template |= {"BITS": weights.bits, "GROUP_SIZE": weights.group_size}
    (out,) = kernel(
        [
            rows,
            *weights.arrays,
            *(up or weights).arrays,
            pairs,
            constants(0.0) if scores is None else _factors(scores),
        ],
        [((tokens * chosen, outputs), dtype)],
        threadgroups=(outputs // width, count),
        threads=variant.simdgroups * 32,
        template=template,
    )
    return out.reshape(tokens, chosen, outputs)


def padded_pairs(experts: Int32[mx.array, "tokens chosen"]) -> Int32[mx.array, "pairs"]:
    """Return the pairs, at least eight: MLX passes fewer as constant memory. No row is of the padding's expert."""
    flat = experts.reshape(-1)
    return mx.pad(flat, (0, 8 - flat.size), constant_values=-1) if flat.size < 8 else flat


def _factors(scores: mx.array) -> mx.array:
    flat = scores.astype(mx.float32).reshape(-1)
    return mx.pad(flat, (0, 8 - flat.size)) if flat.size < 8 else flat
