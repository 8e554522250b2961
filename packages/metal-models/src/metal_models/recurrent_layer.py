"""Layers that keep a state of fixed size: convolutions, state spaces, delta rules and other recurrences."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from metal_kernels import target
from metal_kv.pool import KVCachePool
from metal_kv.spec import KVCacheSpec, RecurrentStateSpec
from metal_models.cache_view import Step
from metal_models.decode_views import RowStep, StateDecodeView
from metal_models.layer import Layer, UnusedLayer
from metal_models.module_calls import ModuleCalls
from metal_models.sequences import StateView, compile_decoding, run_over_sequences


@dataclass(frozen=True)
class RecurrentLayer(Layer):
    """A layer that carries a state from token to token.

    Attributes:
        module: What reads and writes the state: it is given whole sequences of the step's rows.
        outer: The outermost module that is given the state, most often the model's layer; it may be the same.
        shapes: Of the arrays of one request's state.
        dtypes: Of the same.
    """

    module: nn.Module
    outer: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[mx.Dtype, ...]

    def specs(self, name: str, block_size: int) -> dict[str, KVCacheSpec]:
        """Return the one spec: a state for every block of tokens."""
        return {f"{name}.state": RecurrentStateSpec(block_size, self.shapes, self.dtypes)}

    def view(self, name: str, step: Step, pool: KVCachePool) -> StateView:
        """Return a view over the layer's pages; from now on the modules take such views beside mlx-lm's caches."""
        run_over_sequences(self.module)
        compile_decoding(self.outer)
        return StateView(step, pool.layer(f"{name}.state"), len(self.shapes), compiles=target() == "cpu")

    def decode_view(self, name: str, step: RowStep, pool: KVCachePool) -> StateDecodeView:
        """Return a view for compiled steps; what ``view`` says of ``module`` holds here too."""
        run_over_sequences(self.module)
        return StateDecodeView(step, pool.layer(f"{name}.state"), len(self.shapes))


class NotingStates(ArraysCache):
    """mlx-lm's own cache, which notes who uses it.

    Rows of the traced step are sequences of one token, so the arrays that the model leaves are the states of as
    many requests.

    Args:
        size: Arrays of a state.
        calls: The modules under way.
    """

    def __init__(self, size: int, calls: ModuleCalls) -> None:
        super().__init__(size)
        self._calls = calls
        self._users: list[tuple[nn.Module, ...]] = []

    def __getitem__(self, index: int) -> Any:
        """Return one array of the states."""
        self._users.append(self._calls.that_take(self))
        return self.cache[index]

    def __setitem__(self, index: int, value: Any) -> None:
        """Replace one array of the states."""
        self._users.append(self._calls.that_take(self))
        self.cache[index] = value

    def note(self) -> Layer:
        """Return what was seen.

        Raises:
            TypeError: No one module does all that is done with the state.
        """
        arrays: list[Any] = self.cache
        if not any(isinstance(array, mx.array) for array in arrays):
            return UnusedLayer(None)
        if not all(isinstance(array, mx.array) for array in arrays):
            raise TypeError("a layer leaves a part of its state empty")
        users = [chain for chain in self._users if chain]
        if len(users) < len(self._users):
            raise TypeError("a layer's state is used outside the modules that are given its cache")
        shared = [same for same in zip(*users, strict=False) if all(module is same[0] for module in same)]
        if not shared:
            raise TypeError("a layer's state is used by modules that no one module calls")
        shapes = tuple(array.shape[1:] for array in arrays)
        return RecurrentLayer(shared[-1][0], shared[0][0], shapes, tuple(array.dtype for array in arrays))
