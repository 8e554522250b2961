"""Which modules of a model are under way at any moment of a call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn


class ModuleCalls:
    """The chain of calls from the model to the innermost module, as ``watched`` records it."""

    def __init__(self) -> None:
        self._chain: list[tuple[Any, tuple[Any, ...]]] = []

    def that_take(self, argument: object) -> tuple[Any, ...]:
        """Return the modules under way that were given ``argument`` itself, outermost first."""
        return tuple(module for module, given in self._chain if any(value is argument for value in given))

    def enter(self, module: Any, given: tuple[Any, ...]) -> None:
        """Note that ``module``, or what stands for one, was called."""
        self._chain.append((module, given))

    def leave(self) -> None:
        """Note that the module that was called last has returned."""
        self._chain.pop()


@contextmanager
def watched(model: nn.Module, calls: ModuleCalls) -> Iterator[None]:
    """Let ``calls`` follow the calls of ``model`` and all its modules.

    While it lasts, every module is an instance of a subclass of its class.
    """
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    watching = {cls: _watching(cls, calls) for cls in dict.fromkeys(classes)}
    try:
        for module, cls in zip(modules, classes, strict=True):
            module.__class__ = watching[cls]
        yield
    finally:
        for module, cls in zip(modules, classes, strict=True):
            module.__class__ = cls


def _watching(cls: Any, calls: ModuleCalls) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.enter(self, (*args, *kwargs.values()))
        try:
            return cls.__call__(self, *args, **kwargs)
        finally:
            calls.leave()

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
