"""Settings shared by the tests of cache memory."""

import mlx.core as mx
import pytest
from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def on_cpu():
    """Run on MLX's CPU backend, wherever the tests are started."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
