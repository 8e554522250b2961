"""What happens to the rows of a step between its matmuls."""

import mlx.core as mx
from jaxtyping import Float

from metal_kernels import kernels, reference
from metal_kernels.checks import require_rows
from metal_kernels.device import target
from metal_kernels.errors import MetalKernelsError


def add_rms_norm(
    rows: Float[mx.array, "tokens *addends hidden"],
    residual: Float[mx.array, "tokens hidden"],
    weight: Float[mx.array, "hidden"],
    eps: float,
    beside: Float[mx.array, "tokens hidden"] | None = None,
) -> tuple[Float[mx.array, "tokens hidden"], Float[mx.array, "tokens hidden"]]:
    """Add rows to a residual and normalise the sums to a root mean square of 1 (arXiv:1910.07467).

    Args:
        rows: What a layer returned; with an axis more, what its parts returned, to be summed in float32.
        residual: What it is added to.
        weight: Factor of each column.
        eps: Added to the mean square.
        beside: Further rows to be added, without rounding the sums in between.

    Returns:
        The normalised sums times ``weight``, and the sums themselves, which are the next residual, in its dtype. Sums
        are rounded to it before they are normalised; the mean is taken in float32.

    Raises:
        MetalKernelsError: Shapes differ.
    """
    require_rows("add_rms_norm", "residual", residual, (rows.shape[0], rows.shape[-1]))
    require_rows("add_rms_norm", "weight", weight, rows.shape[-1:])
    dtypes = {rows.dtype, residual.dtype}
    if beside is not None:
        require_rows("add_rms_norm", "beside", beside, residual.shape)
        dtypes.add(beside.dtype)
    if all(isinstance(kernels.row_kernels(target(), dtype, rows.shape[-1]), kernels.Accepted) for dtype in dtypes):
        return kernels.add_rms_norm(rows, residual, weight, eps, beside)
    return reference.add_rms_norm(rows, residual, weight, eps, beside)


def silu_and_mul(gate_up: Float[mx.array, "tokens twice_width"]) -> Float[mx.array, "tokens width"]:
    """Return ``silu(gate) * up`` of rows that hold ``gate`` and then ``up`` (arXiv:2002.05202).

    Raises:
        MetalKernelsError: A row does not fall into two halves.
    """
    if gate_up.shape[1] % 2:
        raise MetalKernelsError(
            f"[silu_and_mul] expected rows of an even length, got {gate_up.shape}. Join gate and up in one row."
        )
    if isinstance(kernels.row_kernels(target(), gate_up.dtype, gate_up.shape[1] // 2), kernels.Accepted):
        return kernels.silu_and_mul(gate_up)
    return reference.silu_and_mul(gate_up)
