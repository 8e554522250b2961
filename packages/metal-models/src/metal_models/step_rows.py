"""What the layers of a compiled step share, and what of a step's metadata they pack into it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Int32

from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layer_cache import LayerCache


class Packer(ABC):
    """Says what of a step's metadata some layers read. Layers with equal packers share what one of them packs."""

    @abstractmethod
    def pack(self, metadata: Sequence[AttentionMetadata], reqs: int) -> tuple[Hashable, Int32[np.ndarray, "elements"]]:
        """Return what the step's metadata says to the layers, padded to ``reqs`` requests.

        Returns:
            Sizes, which a compiled step depends on, and numbers, which it takes as an input.
        """


class StepRows:
    """What the layers of one step share.

    Args:
        positions: Of every row.
        parts: For each packer of the step, the sizes and the numbers that it packed.
    """

    def __init__(
        self, positions: Int32[mx.array, "tokens"], parts: Mapping[Packer, tuple[Any, Int32[mx.array, "elements"]]]
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
        seen_as: How the step sees the pages: the same bytes in another shape or dtype.
    """

    def __init__(
        self, cache: LayerCache, *, in_place: bool, seen_as: Callable[[mx.array], mx.array] = lambda pages: pages
    ) -> None:
        self._cache = cache
        self._seen_as = seen_as
        self._held = seen_as(cache.kv_cache) if in_place else None
        mx.eval(self._held)

    @property
    def array(self) -> mx.array:
        """The pages, as last written."""
        return self._seen_as(self._cache.kv_cache) if self._held is None else self._held

    def rewrite(self, write: Callable[[mx.array], tuple[mx.array, mx.array]]) -> mx.array:
        """Let ``write`` make new pages of the pages, beside a result that is returned."""
        if self._held is not None:
            return write(self._held)[0]
        results = []

        def written(pages: mx.array) -> mx.array:
            result, new = write(self._seen_as(pages))
            results.append(result)
            return new

        self._cache.update(written)
        return results[0]
