"""Ranges of the same row, joined."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.decode_plan import DecodePlan
from metal_kernels.kernels.source import PortableKernel, constants

_SIMDGROUPS = 8
_KERNEL = PortableKernel(
    "join_ranges", ("partial_out", "partial_stats", "ranges_in", "sinks_in"), ("out",), "join_ranges.metal"
)


def join_ranges(
    weighted: Float[mx.array, "ranges q_heads head_size"],
    stats: Float[mx.array, "ranges q_heads 2"],
    plan: DecodePlan,
    sinks: Float[mx.array, "q_heads"] | None,
    dtype: mx.Dtype,
) -> Float[mx.array, "decodes q_heads head_size"]:
    """Return the attention of each request of ``plan``.

    Args:
        weighted: Sums of values, weighted by ``2 ** (score - highest)``, per range.
        stats: Highest score, in units of log2, and sum of weights, per range.
        plan: Which ranges are whose.
        sinks: Extra logit per query head.
        dtype: Of the result.
    """
    _, q_heads, head_size = weighted.shape
    (out,) = _KERNEL(
        [weighted, stats, plan.ranges, constants(0.0) if sinks is None else sinks.astype(mx.float32)],
        [((plan.num_reqs, q_heads, head_size), dtype)],
        threadgroups=(plan.num_reqs * q_heads, 1),
        threads=_SIMDGROUPS * 32,
        template={
            "T": dtype,
            "HEAD_SIZE": head_size,
            "Q_HEADS": q_heads,
            "SIMDGROUPS": _SIMDGROUPS,
            "SINKS": sinks is not None,
        },
    )
    return out
