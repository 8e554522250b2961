"""Calls of modules with states, compiled after a while."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from metal_models.compiled_calls import MOST_ROWS, PLAIN_CALLS, CompiledCalls


class Recurrence(nn.Module):
    """A state that decays."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array([0.5, 0.25])

    def __call__(self, x: mx.array, states: list[mx.array], scale: float = 1.0) -> mx.array:
        states[0] = states[0] * self.weight + x * scale
        return mx.tanh(states[0])


class Keeping(Recurrence):
    """Keeps something of a call."""

    def __call__(self, x: mx.array, states: list[mx.array], scale: float = 1.0) -> mx.array:
        self.latest = x * 2
        return super().__call__(x, states, scale)


class Looking(Recurrence):
    """Looks at values."""

    def __call__(self, x: mx.array, states: list[mx.array], scale: float = 1.0) -> mx.array:
        return super().__call__(x, states, scale if x[0, 0].item() > 0 else -scale)


class Calls:
    """A module called step by step, compiled where it can be."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.compiled = CompiledCalls(module)
        self.cache = object()

    def __call__(self, x: mx.array, state: mx.array, **kwargs: Any) -> tuple[mx.array, mx.array] | None:
        def call(args: Any, kwargs: Any, cache: object, states: list[Any]) -> tuple[Any, list[Any]]:
            return self.module(*(states if value is cache else value for value in args), **kwargs), states

        result = self.compiled(call, (x, self.cache), kwargs, self.cache, len(x), lambda: [state])
        return None if result is None else (result[0], result[1][0])


def rows(count: int, seed: int) -> mx.array:
    return mx.random.normal((count, 2), key=mx.random.key(seed))


def warm(calls: Calls, count: int, **kwargs: Any) -> None:
    for step in range(PLAIN_CALLS):
        assert calls(rows(count, step), rows(count, 99), **kwargs) is None


@pytest.mark.parametrize("count", [1, 3])
def test_the_same_as_plain_calls(count: int) -> None:
    calls = Calls(Recurrence())
    warm(calls, count)
    for step in range(3):
        x, state = rows(count, step), rows(count, 50 + step)
        result = calls(x, state)
        assert result is not None
        states = [state]
        assert mx.allclose(result[0], calls.module(x, states), atol=1e-6)
        assert mx.allclose(result[1], states[0], atol=1e-6)


def test_new_weights_are_used() -> None:
    calls = Calls(Recurrence())
    warm(calls, 1)
    x, state = mx.zeros((1, 2)), mx.ones((1, 2))
    calls(x, state)
    calls.module.weight = mx.array([2.0, 4.0])
    result = calls(x, state)
    assert result is not None
    assert result[1].tolist() == [[2.0, 4.0]]


def test_other_values_are_another_graph() -> None:
    calls = Calls(Recurrence())
    warm(calls, 1)
    for scale in (1.0, 3.0, 1.0):
        result = calls(mx.ones((1, 2)), mx.zeros((1, 2)), scale=scale)
        assert result is not None
        assert result[1].tolist() == [[scale, scale]]


def test_many_rows_and_other_arguments_are_left_alone() -> None:
    calls = Calls(Recurrence())
    for _ in range(PLAIN_CALLS + 2):
        assert calls(rows(MOST_ROWS + 1, 0), rows(MOST_ROWS + 1, 1)) is None
        assert calls(rows(1, 0), rows(1, 1), scale=object()) is None


@pytest.mark.parametrize("kind", [Keeping, Looking])
def test_modules_that_cannot_be_compiled(kind: type[Recurrence]) -> None:
    calls = Calls(kind())
    warm(calls, 1)
    for _ in range(2):
        assert calls(rows(1, 0), rows(1, 1)) is None
    calls.module(mx.ones((1, 2)), [mx.ones((1, 2))])
    assert calls.module.weight.tolist() == [0.5, 0.25]
