"""What a layer does between its rows and the cache, for steps of one row per request."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Int32

from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layer_cache import LayerCache
from metal_models.joined_linear import JoinedLinear
from metal_models.normed_rows import NormedRows


class StepRows:
    """What the layers of one step share.

    Args:
        positions: Of every row.
        parts: For each key of the step's mixers, the sizes and the numbers that it packed.
    """

    def __init__(
        self, positions: Int32[mx.array, "tokens"], parts: Mapping[Hashable, tuple[Any, Int32[mx.array, "elements"]]]
    ) -> None:
        self.positions = positions
        self.parts = parts
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned when it was first called with ``key`` in this step."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


class Pages:
    """One layer's pages, as a step reads and writes them.

    Args:
        cache: The layer.
        in_place: Whether kernels write the pages themselves. Then they are the same memory for good, and a compiled
            step may hold it.
    """

    def __init__(self, cache: LayerCache, *, in_place: bool) -> None:
        self._cache = cache
        self._held = cache.kv_cache if in_place else None
        mx.eval(self._held)

    @property
    def array(self) -> mx.array:
        """The pages, as last written."""
        return self._cache.kv_cache if self._held is None else self._held

    def rewrite(self, write: Callable[[mx.array], tuple[mx.array, mx.array]]) -> mx.array:
        """Let ``write`` make new pages of the pages, beside a result that is returned."""
        if self._held is not None:
            return write(self._held)[0]
        results = []

        def written(pages: mx.array) -> mx.array:
            result, new = write(pages)
            results.append(result)
            return new

        self._cache.update(written)
        return results[0]


class BoundMixer(ABC):
    """A layer's mixer over its pages.

    Attributes:
        key: Mixers with equal keys share what one of them packs.
        output: The last projection.
    """

    key: Hashable
    output: JoinedLinear

    @abstractmethod
    def pack(self, metadata: Sequence[AttentionMetadata], reqs: int) -> tuple[Hashable, Int32[np.ndarray, "elements"]]:
        """Return what the step's metadata says to the mixer, padded to ``reqs`` requests.

        Returns:
            Sizes, which a compiled step depends on, and numbers, which it takes as an input.
        """

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
