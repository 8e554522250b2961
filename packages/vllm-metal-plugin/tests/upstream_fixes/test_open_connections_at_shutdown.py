"""uvicorn gets a limit on how long open connections may delay the end."""

import inspect

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
