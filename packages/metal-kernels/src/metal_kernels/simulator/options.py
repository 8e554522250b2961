"""How thoroughly a simulated call is checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from .launch import Schedule
from .strict_check import METAL_VERSIONS


@dataclass(frozen=True)
class Settings:
    """What each call of a simulated kernel does.

    Args:
        metal_versions: Language versions of the strict type check; empty skips it.
        checked: Whether to run once with every memory access checked.
        schedules: Orders of execution whose results must agree.
        allow_unwritten: Whether outputs may keep elements that the kernel never wrote.
        seed: Of the shuffled schedule.
    """

    metal_versions: tuple[tuple[int, int], ...] = METAL_VERSIONS
    checked: bool = True
    schedules: tuple[Schedule, ...] = tuple(Schedule)
    allow_unwritten: bool = False
    seed: int = 1


_DEFAULT = Settings()
_current: ContextVar[Settings] = ContextVar("settings", default=_DEFAULT)


def current_settings() -> Settings:
    """The settings in force here."""
    return _current.get()


@contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """Change some `Settings` for the calls made inside the ``with`` block."""
    token = _current.set(replace(_current.get(), **changes))
    try:
        yield _current.get()
    finally:
        _current.reset(token)
