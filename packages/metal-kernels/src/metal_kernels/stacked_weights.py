"""The weights of linear layers of one shape, an expert's or a head's each, plain or quantised."""

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Shaped

from metal_kernels.linear_weights import LinearWeights


@dataclass(frozen=True, eq=False)
class StackedWeights:
    """Linear layers of one shape, stacked, as MLX keeps them: a row per output.

    Attributes:
        weight: Numbers, or with ``bits`` codes of so many bits, packed into uint32 from the lowest bit on.
        scales: Of each group of codes of a row.
        biases: Likewise: a weight is ``code * scale + bias``.
        bits: Of a code; None for plain weights.
        group_size: Codes that share a scale.
    """

    weight: Shaped[mx.array, "layers outputs words"]
    scales: Float[mx.array, "layers outputs groups"] | None = None
    biases: Float[mx.array, "layers outputs groups"] | None = None
    bits: int | None = None
    group_size: int = 64

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, elements of an output row, elements of an input row."""
        layers, outputs, words = self.weight.shape
        return layers, outputs, words * 32 // self.bits if self.bits else words

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays that there are."""
        return [array for array in (self.weight, self.scales, self.biases) if array is not None]

    @property
    def first(self) -> LinearWeights:
        """The first layer."""
        scales, biases = (None if array is None else array[0] for array in (self.scales, self.biases))
        return LinearWeights(self.weight[0], scales, biases, bits=self.bits, group_size=self.group_size)
