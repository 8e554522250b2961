"""Feed-forward parts of layers, for steps of few rows."""

from abc import ABC, abstractmethod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float

from metal_models.joined_linear import JoinedLinear
from metal_models.normed_rows import NormedRows


class FeedForward(ABC):
    """What follows a layer's mixer.

    Attributes:
        output: The last projection; None if the rows are complete without.
    """

    output: JoinedLinear | None = None

    @abstractmethod
    def __call__(self, rows: NormedRows) -> Float[mx.array, "tokens width"]:
        """Return what ``output`` takes."""

    def added(self, rows: NormedRows) -> Float[mx.array, "tokens hidden"]:
        """Return what this part adds to the residual."""
        inner, linear = self(rows), self.output
        if linear is None:
            return inner
        return linear.fused(inner) if linear.fuses(inner.dtype, inner.shape[0]) else linear(inner)

    def add_to(self, rows: NormedRows, norm: Any) -> NormedRows:
        """Return the rows after this part, seen through ``norm``."""
        return rows.plus(self(rows), self.output, norm)


class ModuleFeedForward(FeedForward):
    """A module of the model's own.

    Args:
        module: From normed rows to what is added to the residual.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, rows: NormedRows) -> Float[mx.array, "tokens width"]:
        """Return what is added to the residual."""
        out: mx.array = self._module(rows.normed)
        return out


class ScaledFeedForward(FeedForward):
    """A feed-forward part whose result is multiplied with a number.

    Args:
        inner: The part; its last projection has no bias.
        factor: The number.
    """

    def __init__(self, inner: FeedForward, factor: float) -> None:
        self._inner = inner
        self._factor = factor
        self.output = inner.output

    def __call__(self, rows: NormedRows) -> Float[mx.array, "tokens width"]:
        """Return what ``output`` takes."""
        return self._inner(rows) * self._factor


class GatedFeedForward(FeedForward):
    """A feed-forward part gated by a SiLU.

    Args:
        gate: Projection to what passes through the SiLU.
        up: Projection to what it gates.
        down: Back to hidden rows.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        self._gate_up = JoinedLinear([gate, up])
        self.output: JoinedLinear = JoinedLinear([down])

    @staticmethod
    def possible(gate: Any, up: Any, down: Any) -> bool:
        """Whether these layers can be joined."""
        return JoinedLinear.joinable([gate, up]) and JoinedLinear.joinable([down])

    def __call__(self, rows: NormedRows) -> Float[mx.array, "tokens width"]:
        """Return what ``output`` takes."""
        return rows.through(self._gate_up, gated=True)


def feed_forward_possible(module: Any) -> bool:
    """Whether a dense part with the usual names can be joined; experts run on their own module where not."""
    if not hasattr(module, "gate_proj"):
        return True
    return GatedFeedForward.possible(module.gate_proj, module.up_proj, module.down_proj)
