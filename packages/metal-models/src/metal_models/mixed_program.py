"""The decode step of models whose layers are of several kinds: a token mixer, a norm, a feed-forward part, a norm.

The plain path, mlx-lm's own modules over views of the cache, is the specification.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32

from metal_kernels import add_rms_norm, silu_and_mul
from metal_models.joined_linear import JoinedLinear
from metal_models.token_mixer import BoundMixer, StepRows, TokenMixer


@dataclass(frozen=True, eq=False)
class MixedLayer:
    """One layer.

    Attributes:
        mixer: Attention or recurrence.
        mixer_norm: Of the rows that the mixer takes.
        feed_forward: From normed rows to what is added to the residual: a module of the model's own, or joined.
        feed_forward_norm: Of the rows that the feed-forward part takes.
    """

    mixer: TokenMixer
    mixer_norm: nn.RMSNorm
    feed_forward: Callable[[mx.array], mx.array]
    feed_forward_norm: nn.RMSNorm


@dataclass(frozen=True, eq=False)
class MixedProgram:
    """A model's layers, in a form that computes one row per request.

    Attributes:
        embed: From token ids to rows.
        layers: Its layers.
        norm: Of the last rows.
    """

    embed: Callable[[mx.array], mx.array]
    layers: Sequence[MixedLayer]
    norm: nn.RMSNorm

    def __call__(
        self, token_ids: Int32[mx.array, "tokens"], mixers: Sequence[BoundMixer], step: StepRows
    ) -> Float[mx.array, "tokens hidden"]:
        """Return hidden rows.

        Args:
            token_ids: One id for each row.
            mixers: Those of the layers, over their pages.
            step: What the layers share.
        """
        residual = self.embed(token_ids)
        first: Any = self.layers[0].mixer_norm
        rows = first(residual)
        next_norms = [layer.mixer_norm for layer in self.layers[1:]] + [self.norm]
        for layer, mixer, next_norm in zip(self.layers, mixers, next_norms, strict=True):
            rows, residual = _add_norm(mixer(rows, step), residual, layer.feed_forward_norm)
            rows, residual = _add_norm(layer.feed_forward(rows), residual, next_norm)
        return rows


def feed_forward_possible(module: Any) -> bool:
    """Whether a dense part with the usual names can be joined; experts run on their own module where not."""
    if not hasattr(module, "gate_proj"):
        return True
    return GatedFeedForward.possible(module.gate_proj, module.up_proj, module.down_proj)


class GatedFeedForward:
    """A feed-forward part gated by a SiLU.

    Args:
        gate: Projection to what passes through the SiLU.
        up: Projection to what it gates.
        down: Back to hidden rows.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        self._gate_up = JoinedLinear([gate, up])
        self._down = JoinedLinear([down])

    @staticmethod
    def possible(gate: Any, up: Any, down: Any) -> bool:
        """Whether these layers can be joined."""
        return JoinedLinear.joinable([gate, up]) and JoinedLinear.joinable([down])

    def __call__(self, rows: mx.array) -> mx.array:
        """Return hidden rows of hidden rows."""
        return self._down(silu_and_mul(self._gate_up(rows)))


def _add_norm(rows: mx.array, residual: mx.array, norm: Any) -> tuple[mx.array, mx.array]:
    return add_rms_norm(rows, residual, norm.weight, norm.eps)
