"""vLLM 0.32 and 0.33 never exit on SIGTERM while a client holds a stream open.

The launcher stops the engine first, then waits without limit for uvicorn's open connections, whose answers the
stopped engine cannot finish. With a limit uvicorn says how many it ends, then logs a traceback for each of them, which
is left out here. Can go when ``vllm.entrypoints.launchers.launcher`` passes uvicorn a
``timeout_graceful_shutdown``.
"""

import asyncio
import logging
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
        logging.getLogger("uvicorn.error").addFilter(_says_more)

    uvicorn.Config.__init__ = init  # type: ignore[method-assign]


def _says_more(record: logging.LogRecord) -> bool:
    """False for the traceback of an answer that uvicorn ended itself."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
