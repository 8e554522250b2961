"""What stands behind one of a model's caches: a class per kind of layer, found by tracing."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from metal_kv.pool import KVCachePool
from metal_kv.spec import KVCacheSpec
from metal_models.cache_view import CacheView, Step
from metal_models.decode_views import RowStep


class Layer(ABC):
    """What a layer stores, and the view that the model gets in place of its cache."""

    @abstractmethod
    def specs(self, name: str, block_size: int) -> dict[str, KVCacheSpec]:
        """Return what the layer keeps in the pool, by names that start with ``name``."""

    @abstractmethod
    def view(self, name: str, step: Step, pool: KVCachePool) -> Any:
        """Return the view over what ``specs(name, …)`` put into ``pool``."""

    @abstractmethod
    def decode_view(self, name: str, step: RowStep, pool: KVCachePool) -> Any:
        """Return the same for steps of one row per request that are compiled.

        Raises:
            NotCompiledError: No kernel does what they need.
        """


@runtime_checkable
class NotingCache(Protocol):
    """Given to a model in place of a cache while it is traced."""

    def note(self) -> Layer:
        """Return what the model did with it.

        Raises:
            TypeError: Something that the paged cache does not do; the text says what.
        """
        ...


@dataclass(frozen=True)
class UnusedLayer(Layer):
    """A cache that the model makes and never stores anything in.

    Attributes:
        window: What the model's own cache would keep: masks are made from it.
    """

    window: int | None

    def specs(self, name: str, block_size: int) -> dict[str, KVCacheSpec]:
        """Return nothing."""
        del name, block_size
        return {}

    def view(self, name: str, step: Step, pool: KVCachePool) -> CacheView:
        """Return a view that knows positions and makes masks."""
        del name, pool
        return CacheView(step, self.window)

    def decode_view(self, name: str, step: RowStep, pool: KVCachePool) -> CacheView:
        """Return such a view."""
        return self.view(name, step, pool)


class ViewList:
    """Stands for mlx-lm's ``CacheList``: several caches of one layer.

    Args:
        views: One for each of the layer's caches.
    """

    def __init__(self, views: list[Any]) -> None:
        self._views = views

    def __getitem__(self, index: int) -> Any:
        """Return one of the views."""
        return self._views[index]


@dataclass(frozen=True)
class CompositeLayer(Layer):
    """A layer with several caches.

    Attributes:
        parts: What stands behind each.
    """

    parts: tuple[Layer, ...]

    def specs(self, name: str, block_size: int) -> dict[str, KVCacheSpec]:
        """Return the specs of all parts."""
        specs: dict[str, KVCacheSpec] = {}
        for index, part in enumerate(self.parts):
            specs.update(part.specs(f"{name}.{index}", block_size))
        return specs

    def view(self, name: str, step: Step, pool: KVCachePool) -> ViewList:
        """Return the views of all parts."""
        return ViewList([part.view(f"{name}.{index}", step, pool) for index, part in enumerate(self.parts)])

    def decode_view(self, name: str, step: RowStep, pool: KVCachePool) -> ViewList:
        """Return the views of all parts."""
        return ViewList([part.decode_view(f"{name}.{index}", step, pool) for index, part in enumerate(self.parts)])


class NotingList(ViewList):
    """Stands for ``CacheList`` while the model is traced."""

    def note(self) -> Layer:
        """Return what stands behind each part."""
        return CompositeLayer(tuple(view.note() for view in self._views))


def all_specs(layers: Mapping[str, Layer], block_size: int) -> dict[str, KVCacheSpec]:
    """Return the specs of ``layers`` (by name), in order."""
    return {key: spec for name, layer in layers.items() for key, spec in layer.specs(name, block_size).items()}
