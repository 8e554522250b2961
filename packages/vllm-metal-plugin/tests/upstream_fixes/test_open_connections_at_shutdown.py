"""uvicorn gets a limit on how long open connections may delay the end."""

import asyncio
import inspect
import logging

import pytest
import uvicorn
from vllm.entrypoints.launchers import launcher

from vllm_metal_plugin.upstream_fixes import open_connections_at_shutdown as fix


def test_workaround_is_still_needed() -> None:
    """Fails when vLLM sets a limit itself: then the file can go."""
    assert "timeout_graceful_shutdown" not in inspect.getsource(launcher)


def test_every_server_has_a_limit_unless_it_says_otherwise() -> None:
    fix.install()
    fix.install()
    assert uvicorn.Config(None).timeout_graceful_shutdown == fix.GRACE_S
    assert uvicorn.Config(None, timeout_graceful_shutdown=9).timeout_graceful_shutdown == 9


def test_answers_that_the_limit_ends_leave_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    fix.install()
    uvicorn.Config(None)
    for error in (asyncio.CancelledError("timeout"), ValueError("a fault")):
        logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=error)
    logged = capsys.readouterr().err
    assert "ValueError: a fault" in logged
    assert "CancelledError" not in logged
