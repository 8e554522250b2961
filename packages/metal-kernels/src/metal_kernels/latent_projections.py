"""What latent attention has to know of a layer to choose where its projections go."""

from typing import Protocol, runtime_checkable

import mlx.core as mx
from jaxtyping import Float


@runtime_checkable
class LatentProjections(Protocol):
    """The up-projections of one layer's keys and values: applied to queries and results, or to what is cached."""

    @property
    def value_size(self) -> int:
        """Elements of a value."""

    def absorb(
        self, query: Float[mx.array, "tokens q_heads head_size"]
    ) -> Float[mx.array, "tokens q_heads latent_size"]:
        """Return queries times the up-projection of keys, so that they meet latents."""

    def unabsorb(
        self, weighted: Float[mx.array, "tokens q_heads latent_size"]
    ) -> Float[mx.array, "tokens q_heads value_size"]:
        """Return weighted latents times the up-projection of values."""

    def expand(
        self, latent: Float[mx.array, "keys latent_size"]
    ) -> tuple[Float[mx.array, "q_heads keys head_size"], Float[mx.array, "q_heads keys value_size"]]:
        """Return the keys and values of latents."""
