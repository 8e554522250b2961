"""What one row of a Mamba 2 layer's projection holds, and how large its state is."""

from dataclasses import dataclass
from math import prod

import mlx.core as mx


@dataclass(frozen=True)
class Mamba2Rows:
    """The row of a token as its projection leaves it, and the state of a request.

    A row is the gate of every value, the inputs of the convolution, and one time step for each head. The inputs of the
    convolution are all heads' values, then what they are written with, then what they are read with, ``state_size``
    numbers each for a group of heads. The state is the last ``taps - 1`` inputs of the convolution, ``[taps - 1,
    channels]`` in the rows' dtype, and then ``[heads, head_size, state_size]`` in float32.

    Attributes:
        heads: Heads of values.
        head_size: Values of a head.
        groups: Groups of heads that write and read with the same numbers.
        state_size: Numbers kept for each value.
        taps: Tokens that the causal convolution sees.
    """

    heads: int
    head_size: int
    groups: int
    state_size: int
    taps: int

    @property
    def values(self) -> int:
        """Values of all heads."""
        return self.heads * self.head_size

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return self.values + 2 * self.groups * self.state_size

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.values + self.channels + self.heads

    @property
    def state_shapes(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Shapes of the two arrays of a state."""
        return (self.taps - 1, self.channels), (self.heads, self.head_size, self.state_size)

    def state_words(self, dtype: mx.Dtype) -> tuple[int, int]:
        """Return the 4-byte words of the two arrays of a state; the first is rounded down."""
        history, memory = self.state_shapes
        return prod(history) * dtype.size // 4, prod(memory)
