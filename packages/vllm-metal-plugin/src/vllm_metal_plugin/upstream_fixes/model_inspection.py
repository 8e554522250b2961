"""vLLM 0.32 looks at a model's class in another process, lest importing its module initialise CUDA in this one.

That process imports all of vLLM and torch anew, some ten seconds at the first start of each architecture; the module
alone takes a few hundredths of a second, and torch has no device here. It can go when ``inspect_model_cls`` of
``vllm.model_executor.models.registry`` asks the platform, or imports in place.
"""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def install() -> None:
    """Look at classes in this process; safe to repeat."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = _here  # noqa: SLF001  there is no public way


def _here(look: Callable[[], T]) -> T:
    return look()
