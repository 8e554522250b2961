"""The decode step of a model as few operations: for each layer a norm, a token mixer, a norm, a feed-forward part.

The plain path, mlx-lm's own modules over views of the cache, is the specification.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32

from metal_models.feed_forward import FeedForward
from metal_models.normed_rows import NormedRows
from metal_models.step_rows import StepRows
from metal_models.token_mixer import BoundMixer, TokenMixer


@dataclass(frozen=True, eq=False)
class DecodeLayer:
    """One layer.

    Attributes:
        mixer: Attention or recurrence; None for a feed-forward part alone.
        mixer_norm: Of the rows that the layer takes.
        feed_forward: What follows, if anything does.
        feed_forward_norm: Of the rows that the feed-forward part takes from a mixer.
        beside: Another mixer that takes the same rows. Its cache is then the layer's first, ``mixer``'s the second.
    """

    mixer: TokenMixer | None
    mixer_norm: nn.RMSNorm
    feed_forward: FeedForward | None = None
    feed_forward_norm: nn.RMSNorm | None = None
    beside: TokenMixer | None = None

    def caches(self, name: str) -> dict[str, TokenMixer]:
        """Return the mixers of the layer ``name`` by the names of their caches."""
        if self.mixer is None:
            return {}
        if self.beside is None:
            return {f"{name}.{self.mixer.keeps}": self.mixer}
        return {f"{name}.0.{self.beside.keeps}": self.beside, f"{name}.1.{self.mixer.keeps}": self.mixer}


@dataclass(frozen=True, eq=False)
class DecodeProgram:
    """A model's layers, in a form that computes one row per request.

    Attributes:
        embed: From token ids to rows.
        layers: Its layers.
        norm: Of the last rows.
    """

    embed: Callable[[mx.array], mx.array]
    layers: Sequence[DecodeLayer]
    norm: nn.RMSNorm

    @property
    def num_caches(self) -> int:
        """Layers that have caches."""
        return sum(layer.mixer is not None for layer in self.layers)

    def caches(self, names: Sequence[str]) -> dict[str, TokenMixer]:
        """Return the mixers by the names of their caches, for layers with caches called ``names``."""
        layers = zip((layer for layer in self.layers if layer.mixer is not None), names, strict=True)
        return {cache: mixer for layer, name in layers for cache, mixer in layer.caches(name).items()}

    def __call__(
        self, token_ids: Int32[mx.array, "tokens"], mixers: Sequence[BoundMixer], step: StepRows
    ) -> Float[mx.array, "tokens hidden"]:
        """Return hidden rows.

        Args:
            token_ids: One id for each row.
            mixers: Those of the layers, over their pages; of a layer with two the one beside first.
            step: What the layers share.
        """
        rows = NormedRows(self.embed(token_ids), self.layers[0].mixer_norm)
        next_norms = [layer.mixer_norm for layer in self.layers[1:]] + [self.norm]
        bound = iter(mixers)
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            if layer.beside is not None:
                mixer = next(bound)
                rows = rows.with_added(mixer(rows, step), mixer.output)
            if layer.mixer is not None:
                mixer = next(bound)
                rows = rows.plus(mixer(rows, step), mixer.output, layer.feed_forward_norm or next_norm)
            if layer.feed_forward is not None:
                rows = layer.feed_forward.add_to(rows, next_norm)
        return rows.normed
