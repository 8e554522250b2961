"""vLLM 0.32 and 0.33 empty torch's accelerator cache at shutdown, which raises where there is none.

``cleanup_dist_env_and_memory`` calls ``torch.accelerator.empty_cache()`` on every platform that is not vLLM's
own CPU platform. It can go when that call is guarded by ``torch.accelerator.is_available()``.
"""

from typing import Any


def install() -> None:
    """Make the two calls do nothing where there is no accelerator."""
    import torch

    if torch.accelerator.is_available():
        return
    for name in ("empty_cache", "empty_host_cache"):
        if hasattr(torch.accelerator, name):
            setattr(torch.accelerator, name, _nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """There is no cache to empty."""
