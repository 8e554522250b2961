"""A launch whose engine cannot start ends with the engine's reason."""

import inspect

import pytest
from vllm.v1.engine import utils

from metal_kv import NotEnoughMemoryError
from vllm_metal_plugin.errors import VllmMetalPluginError
from vllm_metal_plugin.upstream_fixes import failed_starts as fix


def test_workaround_is_still_needed() -> None:
    """Fails when vLLM passes the reason on itself: then the file can go."""
    assert "See root cause above" in inspect.getsource(inspect.unwrap(utils.wait_for_engine_startup))


@pytest.mark.parametrize(
    ("error", "for_users", "text"),
    [
        (NotEnoughMemoryError("Paged attention: no room."), True, "Paged attention: no room."),
        (VllmMetalPluginError("[config] expected a, got b."), True, "[config] expected a, got b."),
        (ValueError("No available memory for the cache blocks. Try"), True, "No available memory"),
        (ValueError("shapes differ"), False, "[engine] expected the engine to start, got ValueError: shapes differ."),
    ],
)
def test_which_reasons_are_meant_for_users(error: Exception, for_users: bool, text: str) -> None:
    assert fix.is_for_users(error) is for_users
    assert fix.reason(error).startswith(text)
