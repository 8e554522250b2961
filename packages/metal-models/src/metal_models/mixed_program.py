"""The decode step of models whose layers are of several kinds: a token mixer, a norm, a feed-forward part, a norm.

The plain path, mlx-lm's own modules over views of the cache, is the specification.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32

from metal_models.feed_forward import FeedForward
from metal_models.normed_rows import NormedRows
from metal_models.token_mixer import BoundMixer, StepRows, TokenMixer


@dataclass(frozen=True, eq=False)
class MixedLayer:
    """One layer.

    Attributes:
        mixer: Attention or recurrence.
        mixer_norm: Of the rows that the mixer takes.
        feed_forward: What follows.
        feed_forward_norm: Of the rows that the feed-forward part takes.
    """

    mixer: TokenMixer
    mixer_norm: nn.RMSNorm
    feed_forward: FeedForward
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
        rows = NormedRows(self.embed(token_ids), self.layers[0].mixer_norm)
        next_norms = [layer.mixer_norm for layer in self.layers[1:]] + [self.norm]
        for layer, mixer, next_norm in zip(self.layers, mixers, next_norms, strict=True):
            rows = rows.plus(mixer(rows, step), mixer.output, layer.feed_forward_norm)
            rows = rows.plus(layer.feed_forward(rows), layer.feed_forward.output, next_norm)
        return rows.normed
