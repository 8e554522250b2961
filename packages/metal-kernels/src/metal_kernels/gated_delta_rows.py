"""What one row of a gated delta net's joined projections holds, and how large its state is."""

from dataclasses import dataclass
from math import prod

import mlx.core as mx


@dataclass(frozen=True)
class HeadPart:
    """Where every key head's share of something lies in a row.

    Attributes:
        start: First element of head 0.
        step: Elements from one head to the next.
    """

    start: int
    step: int


@dataclass(frozen=True)
class GatedDeltaRows:
    """The row of a token as its projections leave it, and the state of a request.

    A key head serves ``v_heads / k_heads`` value heads; of values and gates a key head has as many vectors, one after
    the other, and of ``beta`` and ``decay`` as many numbers. The state is the last ``taps - 1`` inputs of the
    convolution, ``[taps - 1, channels]`` in the rows' dtype, and then ``[v_heads, v_size, k_size]`` in float32.
    Channels are all queries, then all keys, then all values.

    Attributes:
        k_heads: Heads of queries and keys.
        v_heads: Heads of values.
        k_size: Width of a query or key.
        v_size: Width of a value.
        taps: Tokens that the causal convolution sees.
        query: Queries before the convolution.
        key: Keys before it.
        value: Values before it.
        gate: What the normed output is gated with.
        beta: How much of a value is written, before the sigmoid.
        decay: How much of the state is forgotten, before the softplus.
    """

    k_heads: int
    v_heads: int
    k_size: int
    v_size: int
    taps: int
    query: HeadPart
    key: HeadPart
    value: HeadPart
    gate: HeadPart
    beta: HeadPart
    decay: HeadPart

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return 2 * self.k_heads * self.k_size + self.v_heads * self.v_size

    @property
    def state_shapes(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Shapes of the two arrays of a state."""
        return (self.taps - 1, self.channels), (self.v_heads, self.v_size, self.k_size)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return 2 * (self.k_heads * self.k_size + self.v_heads * self.v_size + self.v_heads)

    def state_words(self, dtype: mx.Dtype) -> tuple[int, int]:
        """Return the 4-byte words of the two arrays of a state; the first is rounded down."""
        history, memory = self.state_shapes
        return prod(history) * dtype.size // 4, prod(memory)
