"""How thoroughly a simulated call is checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from .errors import SimulatorError
from .launch import Schedule
from .strict_check import METAL_VERSIONS


@dataclass(frozen=True)
class Settings:
    """What each call of a simulated kernel does.

    Args:
        metal_versions: Language versions of the strict type check; empty skips it.
        checked: Whether to run once with every memory access checked.
        schedules: Orders of execution whose results must agree; with ``checked``, none is needed.
        allow_unwritten: Whether outputs may keep elements that the kernel never wrote.
        seed: Of the shuffled schedule.
    """

    metal_versions: tuple[tuple[int, int], ...] = METAL_VERSIONS
    checked: bool = True
    schedules: tuple[Schedule, ...] = tuple(Schedule)
    allow_unwritten: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        if not (self.checked or self.schedules):
            raise SimulatorError("[settings] expected a checked run or a schedule, got neither. Choose one.")


_current: ContextVar[Settings | None] = ContextVar("settings", default=None)
_default = Settings()


def current_settings() -> Settings:
    """The settings in force here."""
    return _current.get() or _default


def set_default_settings(chosen: Settings) -> None:
    """What holds outside every `settings` block, in all threads."""
    global _default
    _default = chosen


@contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """Change some `Settings` for the calls made inside the ``with`` block."""
    chosen = replace(current_settings(), **changes)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)
