"""Compiled calls of modules that carry a state, for steps of one row per request on a CPU."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

MOST_ROWS = 16
"""Rows up to which calls are compiled: beyond, a step's arithmetic takes so long that the host hardly counts."""

PLAIN_CALLS = 4
"""Calls with as many rows that come first: what does not last is not worth a graph."""

_STATIC = (bool, int, float, str, type(None))

_CACHE = object()
"""Stands for the cache in what a graph keeps of its arguments: the cache itself holds the pool."""

Call = Callable[[tuple[Any, ...], dict[str, Any], object, list[Any]], tuple[Any, list[Any]]]
"""Takes a module's arguments, which of them is the cache and the states in it; returns the output and new states."""


class CompiledCalls:
    """One module's calls as graphs, at most one for each number of rows and each form of its other arguments.

    Building a graph again and again is what a small model spends on the host; a compiled one also joins element-wise
    operations, of which a state's update consists. Weights are inputs of the graphs, so that they may be replaced.
    A module that cannot be compiled, because it looks at values or keeps something of a call, runs as it is.

    Args:
        module: What is called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._calls: dict[int, int] = {}
        self._graphs: dict[Hashable, Any] = {}
        self._proven: set[Hashable] = set()
        self._impossible = False

    def __call__(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: object,
        rows: int,
        read: Callable[[], list[mx.array]],
    ) -> tuple[Any, list[mx.array]] | None:
        """Return what ``call`` returns, lazily; None if it is not to be compiled (yet).

        Args:
            call: Does the same in every step for equal arguments.
            args: Of the module; arrays are inputs of the graph.
            kwargs: Likewise.
            cache: One of the arguments.
            rows: Of the step.
            read: Returns the states, arrays of as many rows.
        """
        if self._impossible or not self._lasts(rows):
            return None
        arrays: list[mx.array] = []
        form: list[tuple[object, object]] = []
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, mx.array):
                arrays.append(value)
                form.append((name, mx.array))
            elif value is cache:
                form.append((name, _CACHE))
            elif isinstance(value, _STATIC):
                form.append((name, (type(value), value)))
            else:
                return None
        key = tuple(form)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._graph(call, args, kwargs, cache)
        states = read()
        weights = None if key in self._proven else list(_places(self.module.state))
        try:
            output, new = graph(arrays, states)
        except (RuntimeError, TypeError, ValueError):
            self._impossible, self._graphs = True, {}
            for place, name, weight in weights or ():  # a trace that fails leaves its own arrays there
                place[name] = weight
            return None
        self._proven.add(key)
        return output, new

    def _lasts(self, rows: int) -> bool:
        if rows > MOST_ROWS:
            return False
        calls = self._calls[rows] = self._calls.get(rows, 0) + 1
        return calls > PLAIN_CALLS

    def _graph(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], cache: object) -> Any:
        """Return a compiled function of the arguments' arrays and the states; it keeps neither arrays nor cache."""

        def kept(value: Any) -> Any:
            return _CACHE if value is cache else mx.array if isinstance(value, mx.array) else value

        kept_args = [kept(value) for value in args]
        kept_kwargs = {name: kept(value) for name, value in kwargs.items()}

        def run(arrays: list[mx.array], states: list[mx.array]) -> tuple[Any, list[mx.array]]:
            inputs, before = iter(arrays), self._held()
            new_args = tuple(next(inputs) if value is mx.array else value for value in kept_args)
            new_kwargs = {name: next(inputs) if value is mx.array else value for name, value in kept_kwargs.items()}
            result = call(new_args, new_kwargs, _CACHE, list(states))
            if self._held() != before:
                raise TypeError("the module keeps arrays of a call")
            return result

        return mx.compile(run, inputs=[self.module.state])

    def _held(self) -> list[tuple[Any, int]]:
        """Return which arrays the module holds."""
        return [(name, id(array)) for _, name, array in _places(self.module.state)]


def _places(tree: Any) -> Iterator[tuple[Any, Any, mx.array]]:
    """Return every array among a module's parts, with what holds it under which name."""
    for name, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        if isinstance(value, mx.array):
            yield tree, name, value
        elif isinstance(value, dict | list):
            yield from _places(value)
