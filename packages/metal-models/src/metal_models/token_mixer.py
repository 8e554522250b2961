"""What a layer does between its rows and the cache, for steps of one row per request."""

from abc import ABC, abstractmethod

import mlx.core as mx
from jaxtyping import Float

from metal_kv.layer_cache import LayerCache
from metal_models.joined_linear import JoinedLinear
from metal_models.normed_rows import NormedRows
from metal_models.step_rows import Packer, StepRows


class BoundMixer(ABC):
    """A layer's mixer over its pages.

    Attributes:
        packer: What it needs of a step's metadata.
        output: The last projection.
    """

    packer: Packer
    output: JoinedLinear

    @abstractmethod
    def __call__(self, rows: NormedRows, step: StepRows) -> Float[mx.array, "tokens width"]:
        """Return what ``output`` takes."""


class TokenMixer(ABC):
    """A layer's attention or recurrence, made from the modules of a model.

    Attributes:
        keeps: How the layer's cache is named, after the layer's own name.
    """

    keeps: str

    @abstractmethod
    def served(self, cache: LayerCache) -> bool:
        """Whether kernels of the default device do all of it."""

    @abstractmethod
    def bind(self, cache: LayerCache, *, in_place: bool) -> BoundMixer:
        """Return the mixer over ``cache``; see ``Pages``."""
