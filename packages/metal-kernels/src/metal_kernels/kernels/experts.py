"""Feed-forward parts of experts, on the few rows of a decode step."""

import mlx.core as mx
from jaxtyping import Float, Int32

from metal_kernels.kernels.dispatch import ExpertVariant
from metal_kernels.kernels.expert_matrix import padded_pairs
from metal_kernels.kernels.source import PortableKernel, constants

_INPUTS = ("rows_in", "weight_in", "up_in", "experts_in", "scores_in")
_EXPERTS = PortableKernel(
    "expert_linear", _INPUTS, ("out",), "expert_linear.metal", contiguous=True, headers=("words", "expert_pairs")
)
_CHOOSE = PortableKernel(
    "choose_experts",
    ("logits_in", "bias_in", "factors_in"),
    ("experts_out", "scores_out"),
    "choose_experts.metal",
    contiguous=True,
)


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
    tokens, experts = logits.shape
    ids, scores = _CHOOSE(
        [logits, constants(0.0) if sigmoid_bias is None else sigmoid_bias.astype(mx.float32), constants(scale)],
        [((tokens, chosen), mx.int32), ((tokens, chosen), mx.float32)],
        threadgroups=(tokens, 1),
        threads=32,
        template={
            "T": logits.dtype,
            "EXPERTS": experts,
            "CHOSEN": chosen,
            "NORMALISED": normalised,
            "SIGMOID": sigmoid_bias is not None,
            "GROUPS": groups,
            "KEPT": kept_groups,
        },
    )
    return ids, scores


def expert_silu_and_mul(
    rows: Float[mx.array, "tokens hidden"],
    gate: Float[mx.array, "experts width inputs"],
    up: Float[mx.array, "experts width inputs"],
    experts: Int32[mx.array, "tokens chosen"],
    variant: ExpertVariant,
) -> Float[mx.array, "tokens chosen width"]:
    """Multiply and gate rows; see :func:`metal_kernels.expert_silu_and_mul`."""
    tokens, chosen = experts.shape
    pairs = padded_pairs(experts)
    return _launch(rows, gate, up, pairs, constants(0.0), chosen, variant, rows.dtype, tokens * chosen).reshape(
        tokens, chosen, -1
    )


def expert_linear(
    rows: Float[mx.array, "tokens chosen width"],
    weight: Float[mx.array, "experts hidden inputs"],
    experts: Int32[mx.array, "tokens chosen"],
    scores: Float[mx.array, "tokens chosen"],
    variant: ExpertVariant,
) -> Float[mx.array, "tokens chosen hidden"]:
    """Multiply rows; see :func:`metal_kernels.expert_linear`."""
    tokens, chosen, width = rows.shape
    pairs, factors = padded_pairs(experts), scores.astype(mx.float32).reshape(-1)
    factors = mx.pad(factors, (0, pairs.size - factors.size)) if factors.size < pairs.size else factors
    flat = rows.reshape(-1, width)
    return _launch(flat, weight, None, pairs, factors, 1, variant, mx.float32, tokens * chosen).reshape(
        tokens, chosen, -1
    )


def _launch(
    rows: mx.array,
    weight: mx.array,
    up: mx.array | None,
    pairs: mx.array,
    scores: mx.array,
    pairs_per_row: int,
    variant: ExpertVariant,
    dtype: mx.Dtype,
    num_pairs: int,
) -> mx.array:
    _, output, size = weight.shape
    rows_at_once = variant.simdgroups * (variant.rows if up is not None else 2 * variant.rows)
    (out,) = _EXPERTS(
        [rows, weight, weight if up is None else up, pairs, scores],
        [((num_pairs, output), dtype)],
        threadgroups=(-(-output // (rows_at_once * variant.turns)), num_pairs),
        threads=variant.simdgroups * 32,
        template={
            "T": rows.dtype,
            "O": dtype,
            "INPUT": size,
            "OUTPUT": output,
            "PAIRS_PER_ROW": pairs_per_row,
            "GATED": up is not None,
            "ROWS": rows_at_once // variant.simdgroups,
            "TURNS": variant.turns,
            "SIMDGROUPS": variant.simdgroups,
        },
    )
    return out
