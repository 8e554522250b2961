"""What happens to the rows of a step between its matmuls, in one kernel each."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels.kernels.source import PortableKernel, constants

_ELEMENTS = 4  # that a thread takes at once
_MAX_THREADS = 256
_ADD_RMS_NORM = PortableKernel(
    "add_rms_norm",
    ("rows_in", "beside_in", "residual_in", "weight_in", "factors_in"),
    ("normed_out", "sum_out"),
    "add_rms_norm.metal",
    contiguous=True,
)
_SILU_AND_MUL = PortableKernel("silu_and_mul", ("gate_up_in",), ("out",), "silu_and_mul.metal", contiguous=True)


def add_rms_norm(
    rows: Float[mx.array, "tokens *addends hidden"],
    residual: Float[mx.array, "tokens hidden"],
    weight: Float[mx.array, "hidden"],
    eps: float,
    beside: Float[mx.array, "tokens hidden"] | None = None,
) -> tuple[Float[mx.array, "tokens hidden"], Float[mx.array, "tokens hidden"]]:
    """Add and normalise rows; see :func:`metal_kernels.add_rms_norm`."""
    tokens, hidden = residual.shape
    threads = _threads(hidden)
    normed, added = _ADD_RMS_NORM(
        [rows, residual if beside is None else beside, residual, weight, constants(eps)],
        [(residual.shape, residual.dtype)] * 2,
        threadgroups=(tokens, 1),
        threads=threads,
        template={
            "T": residual.dtype,
            "ADDENDS": rows.shape[1] if rows.ndim == 3 else 1,
            "BESIDE": beside is not None,
            "HIDDEN": hidden,
            "THREADS": threads,
        },
    )
    return normed, added


def silu_and_mul(gate_up: Float[mx.array, "tokens twice_width"]) -> Float[mx.array, "tokens width"]:
    """Gate rows; see :func:`metal_kernels.silu_and_mul`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    threads = _threads(width)
    (out,) = _SILU_AND_MUL(
        [gate_up],
        [((tokens, width), gate_up.dtype)],
        threadgroups=(tokens, -(-width // (_ELEMENTS * threads))),
        threads=threads,
        template={"T": gate_up.dtype, "WIDTH": width, "THREADS": threads},
    )
    return out


def _threads(width: int) -> int:
    """Whole SIMD-groups, one run of elements for each thread, up to a limit."""
    return min(_MAX_THREADS, -(-width // (_ELEMENTS * 32)) * 32)
