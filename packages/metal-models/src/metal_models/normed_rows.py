"""Rows on their way through a layer: sums and norms become part of the linear layers where kernels do that."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from metal_kernels import add_rms_norm, silu_and_mul
from metal_models.joined_linear import JoinedLinear


class NormedRows:
    """The residual, and the norm through which a layer sees it.

    Args:
        residual: What layers add to.
        norm: An ``RMSNorm``.
        normed: The normed rows, where they are known already.
    """

    def __init__(
        self,
        residual: Float[mx.array, "tokens hidden"],
        norm: Any,
        normed: Float[mx.array, "tokens hidden"] | None = None,
    ) -> None:
        self._residual = residual
        self._norm = norm
        self._normed = normed

    @property
    def normed(self) -> Float[mx.array, "tokens hidden"]:
        """The normed rows."""
        if self._normed is None:
            self._normed = self._norm(self._residual)
        return self._normed

    def through(self, linear: JoinedLinear, *, gated: bool = False) -> Float[mx.array, "tokens width"]:
        """Return the outputs of ``linear``; if ``gated``, the SiLU of their first half times the second."""
        dtype, tokens = self._residual.dtype, self._residual.shape[0]
        if self._normed is None and linear.fuses(dtype, tokens, normed=True, gated=gated):
            return linear.fused(self._residual, norm=self._norm, gated=gated)
        if not gated:
            return linear(self.normed)
        if linear.fuses(dtype, tokens, gated=True):
            return linear.fused(self.normed, gated=True)
        return silu_and_mul(linear(self.normed))

    def with_added(self, rows: Float[mx.array, "tokens width"], linear: JoinedLinear | None) -> "NormedRows":
        """Return rows that are seen as before, and to which what ``linear`` makes of ``rows`` has been added.

        Args:
            rows: What is added, or what ``linear`` makes it from.
            linear: A last projection, if there is one.
        """
        normed = self.normed
        if linear is not None and linear.fuses(rows.dtype, rows.shape[0]):
            return NormedRows(linear.fused(rows, residual=self._residual), self._norm, normed)
        return NormedRows(self._residual + (rows if linear is None else linear(rows)), self._norm, normed)

    def plus(
        self,
        rows: Float[mx.array, "tokens *parts width"],
        linear: JoinedLinear | None,
        norm: Any,
        beside: Float[mx.array, "tokens hidden"] | None = None,
    ) -> "NormedRows":
        """Return the rows after adding to the residual.

        Args:
            rows: What is added, or what ``linear`` makes it from; or parts that are summed and added.
            linear: The layer's last projection, if it has one.
            norm: Through which the next layer sees the sum.
            beside: Further rows that are added.
        """
        if beside is None and linear is not None and linear.fuses(rows.dtype, rows.shape[0]):
            return NormedRows(linear.fused(rows, residual=self._residual), norm)
        rows = rows if linear is None else linear(rows)
        normed, residual = add_rms_norm(rows, self._residual, norm.weight, norm.eps, beside)
        return NormedRows(residual, norm, normed)
