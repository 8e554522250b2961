"""vLLM 0.32 and 0.33 never exit on SIGTERM while a client holds a stream open.

The launcher stops the engine first, then waits without limit for uvicorn's open connections, whose answers the
stopped engine cannot finish. Can go when ``vllm.entrypoints.launchers.launcher`` passes uvicorn a
``timeout_graceful_shutdown``.
"""

from functools import wraps
from typing import Any

GRACE_S = 3
"""How long connections may take to end; vLLM's own ``--shutdown-timeout`` drains requests before that."""


def install() -> None:
    """Give every uvicorn server a limit; safe to repeat."""
    import uvicorn

    if hasattr(uvicorn.Config.__init__, "__wrapped__"):
        return
    original = uvicorn.Config.__init__

    @wraps(original)
    def init(self: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("timeout_graceful_shutdown", GRACE_S)
        original(self, *args, **kwargs)

    uvicorn.Config.__init__ = init  # type: ignore[method-assign]
