"""Quantised linear layers whose weights have one more factor, which MLX's own have no place for."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear


class FactoredLinear(nn.QuantizedLinear):
    """What a quantised linear layer becomes by ``multiply_by``.

    Attributes:
        factor: One float32 number, no parameter: what the weight's values are multiplied with.
    """

    factor: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Return the outputs; the product with the factor is rounded after it is computed in float32."""
        options: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        out = mx.quantized_matmul(x, self.weight, self.scales, self.get("biases"), transpose=True, **options)
        out = (out.astype(mx.float32) * self.factor).astype(x.dtype)
        return out + self.bias if "bias" in self else out


class FactoredSwitchLinear(QuantizedSwitchLinear):
    """What the quantised layers of experts become by ``multiply_by``.

    Attributes:
        factor: As for ``FactoredLinear``, but one for each expert.
    """

    factor: mx.array

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return the outputs of the experts ``indices``."""
        out = mx.gather_qmm(
            x, self.weight, self.scales, self.get("biases"), rhs_indices=indices, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=sorted_indices,
        )  # fmt: skip
        out = (out.astype(mx.float32) * self.factor[indices][..., None, None]).astype(x.dtype)
        return out + mx.expand_dims(self.bias[indices], -2) if "bias" in self else out


_FACTORED: dict[type, type] = {
    nn.QuantizedLinear: FactoredLinear,
    QuantizedSwitchLinear: FactoredSwitchLinear,
}


def multiply_by(layer: nn.Module, factor: mx.array) -> None:
    """Multiply the values of a quantised layer's weight, in place, with one number, or with one for each expert."""
    experts = isinstance(layer, QuantizedSwitchLinear)
    layer.__class__ = _FACTORED[type(layer)]
    object.__setattr__(layer, "factor", factor.reshape((-1,) if experts else ()).astype(mx.float32))
