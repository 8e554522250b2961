"""The weights of a linear layer, plain or quantised."""

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Shaped


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """A linear layer's weights as MLX keeps them, a row per output.

    Attributes:
        weight: Numbers, or with ``bits`` codes of so many bits, packed into uint32 from the lowest bit on.
        scales: Of each group of codes of a row.
        biases: Likewise: a weight is ``code * scale + bias``.
        bias: Added to the outputs; None for none.
        bits: Of a code; None for plain weights.
        group_size: Codes that share a scale.
    """

    weight: Shaped[mx.array, "outputs words"]
    scales: Float[mx.array, "outputs groups"] | None = None
    biases: Float[mx.array, "outputs groups"] | None = None
    bias: Float[mx.array, "outputs"] | None = None
    bits: int | None = None
    group_size: int = 64

    @property
    def outputs(self) -> int:
        """Elements of an output row."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Elements of an input row."""
        return self.weight.shape[1] * 32 // self.bits if self.bits else self.weight.shape[1]
