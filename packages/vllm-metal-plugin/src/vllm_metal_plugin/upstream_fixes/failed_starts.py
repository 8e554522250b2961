"""vLLM 0.32 and 0.33 end a launch whose engine cannot start with three tracebacks, the reason above the last.

The front end knows only that the process has ended. Here the engine's process sends the reason, and the front end
raises it. Reasons that are meant for users are logged in one line; all others keep the engine's traceback. It can go
when ``wait_for_engine_startup`` is told why an engine failed.
"""

import multiprocessing
from functools import partial, wraps
from multiprocessing.connection import Connection
from typing import Any

from vllm.logger import init_logger

from vllm_metal_plugin.errors import EngineStartError, VllmMetalPluginError

_installed = False
_FROM_VLLM = ("To serve at least one request with", "No available memory for the cache blocks")
"""How vLLM's own errors begin that say what a user has to change."""
_NO_REASON = "[engine] expected the engine's process to become ready, got its end. The log above may say why."


def install() -> None:
    """Make launches from this process end with the engine's reason; safe to repeat."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.v1.engine import utils
    from vllm.v1.engine.core import EngineCoreProc

    received, sent = multiprocessing.Pipe(duplex=False)
    wait_for_engine_startup = utils.wait_for_engine_startup

    @wraps(wait_for_engine_startup)
    def wait(*args: Any, **kwargs: Any) -> Any:
        while received.poll():
            received.recv()  # of an earlier launch
        try:
            return wait_for_engine_startup(*args, **kwargs)
        except RuntimeError as error:
            raise EngineStartError(received.recv() if received.poll() else _NO_REASON) from error

    utils.wait_for_engine_startup = wait
    EngineCoreProc.run_engine_core = staticmethod(partial(run_engine_core, sent))


def run_engine_core(reasons: Connection, *args: Any, **kwargs: Any) -> None:
    """Run an engine in this process, new for it; when it cannot start, send the reason."""
    from vllm.v1.engine.core import EngineCoreProc

    init = EngineCoreProc.__init__

    @wraps(init)
    def start(self: Any, *init_args: Any, **init_kwargs: Any) -> None:
        try:
            init(self, *init_args, **init_kwargs)
        except Exception as error:
            reasons.send(reason(error))
            if not is_for_users(error):
                raise
            init_logger(f"vllm.{__name__}").error("The engine cannot start: %s", error)
            raise SystemExit(1) from error

    EngineCoreProc.__init__ = start
    EngineCoreProc.run_engine_core(*args, **kwargs)


def is_for_users(error: BaseException) -> bool:
    """Whether an error's text says all that a user needs."""
    from metal_kernels import MetalKernelsError
    from metal_kv import MetalKVError
    from metal_models import MetalModelsError

    own = (VllmMetalPluginError, MetalModelsError, MetalKVError, MetalKernelsError)
    return isinstance(error, own) or (isinstance(error, ValueError) and str(error).startswith(_FROM_VLLM))


def reason(error: BaseException) -> str:
    """What the front end says."""
    if is_for_users(error):
        return str(error)
    return f"[engine] expected the engine to start, got {type(error).__name__}: {error}. See the traceback above."
