"""Linear layers that take the same rows, as one matmul over memory that they share."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import LinearWeights, fused_linear, kernels, target

_LINEARS = (nn.Linear, nn.QuantizedLinear)
_ARRAYS = ("weight", "scales", "biases", "bias")


class JoinedLinear:
    """Several linear layers as one.

    Their weights are put one after the other into one array, and the layers given that array's parts: they work as
    before, from the same memory.

    Args:
        layers: Plain or quantised linear layers of one kind; see :meth:`joinable`. Changed in place.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        first: Any = layers[0]
        self._arrays: dict[str, mx.array] = {name: _joined(layers, name) for name in _ARRAYS if name in first}
        self._options = {}
        if isinstance(first, nn.QuantizedLinear):
            self._options = {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}
        else:
            self._transposed = self._arrays["weight"].T
            mx.eval(self._transposed)
        self._weights: LinearWeights | None = None
        if self._options.get("mode", "affine") == "affine":
            bits, group_size = self._options.get("bits"), self._options.get("group_size", 64)
            self._weights = LinearWeights(**self._arrays, bits=bits, group_size=group_size)

    @staticmethod
    def joinable(layers: Sequence[Any]) -> bool:
        """Whether ``layers`` are linear, of one kind, and all with a bias or all without."""
        first = layers[0]
        kinds = {
            (type(layer), "bias" in layer, *(getattr(layer, name, None) for name in ("group_size", "bits", "mode")))
            for layer in layers
        }
        dtypes = {layer[name].dtype for layer in layers for name in _ARRAYS[:2] if name in layer}
        return type(first) in _LINEARS and len(kinds) == 1 and len(dtypes) <= 2

    def __call__(self, rows: mx.array) -> mx.array:
        """Return the outputs ``[rows, …]`` of all layers, one after the other, for ``[rows, input]``."""
        if self.fuses(rows.dtype, rows.shape[0]):
            return self.fused(rows)
        arrays = self._arrays
        bias = arrays.get("bias")
        if not self._options:
            return rows @ self._transposed if bias is None else mx.addmm(bias, rows, self._transposed)
        out = mx.quantized_matmul(
            rows, arrays["weight"], arrays["scales"], arrays.get("biases"), transpose=True, **self._options
        )
        return out if bias is None else out + bias

    def fuses(self, dtype: mx.Dtype, rows: int, *, normed: bool = False, gated: bool = False) -> bool:
        """Whether a kernel computes so many rows of the layers with what is around them; see :meth:`fused`."""
        if self._weights is None:
            return False
        linear = kernels.linear_kernel(target(), dtype, self._weights, rows, normed=normed, gated=gated)
        return isinstance(linear, kernels.Accepted)

    def fused(
        self, rows: mx.array, *, norm: Any = None, residual: mx.array | None = None, gated: bool = False
    ) -> mx.array:
        """Return the outputs with what is around the layers; see :func:`metal_kernels.fused_linear`.

        Args:
            rows: ``[rows, input]``.
            norm: An ``RMSNorm`` before the layers.
            residual: Added to the outputs.
            gated: Whether the first half of the outputs gate the second.
        """
        if self._weights is None:
            raise TypeError("codes of this mode have no biases")
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return fused_linear(rows, self._weights, norm=weight, eps=eps, residual=residual, gated=gated)


def _joined(layers: Sequence[Any], name: str) -> mx.array:
    """Join one array of all layers, and give each layer its part of it."""
    if len(layers) == 1:
        whole: mx.array = layers[0][name]
        return whole
    whole = mx.concatenate([layer[name] for layer in layers])
    mx.eval(whole)
    start = 0
    for layer in layers:
        end = start + layer[name].shape[0]
        part = whole[start:end]
        mx.eval(part)
        layer[name] = part
        start = end
    return whole
