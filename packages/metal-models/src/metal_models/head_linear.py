"""A linear layer for each head, as latent attention has them between queries, latents and values."""

from typing import Any

import mlx.core as mx
from jaxtyping import Float
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from metal_kernels import StackedWeights, head_linear, kernels, target


class HeadLinear:
    """One of mlx-lm's modules of a linear layer for each head.

    Attributes:
        weights: Its weights.

    Args:
        module: The module; see :meth:`possible`.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.weights = StackedWeights(module.weight)
        if isinstance(module, QuantizedMultiLinear):
            self.weights = StackedWeights(module.weight, module.scales, module.biases, module.bits, module.group_size)

    @staticmethod
    def possible(module: Any) -> bool:
        """Whether ``module`` is of a known kind."""
        if isinstance(module, QuantizedMultiLinear):
            return bool(module.mode == "affine")
        return isinstance(module, MultiLinear)

    def __call__(self, rows: Float[mx.array, "tokens heads row_size"]) -> Float[mx.array, "tokens heads outputs"]:
        """Return what the layers make of the first elements of each head, as many as they take."""
        linear = kernels.head_linear_kernel(target(), rows.dtype, self.weights, rows.shape[0])
        if isinstance(linear, kernels.Accepted):
            return head_linear(rows, self.weights)
        out: mx.array = self._module(rows[..., : self.weights.shape[2]].swapaxes(0, 1))
        return out.swapaxes(0, 1)
