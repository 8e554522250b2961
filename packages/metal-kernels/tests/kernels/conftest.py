"""Kernels run on the GPU where Metal is available, and in the simulator on Linux."""

import os

import mlx.core as mx
import pytest

from metal_kernels import simulator


@pytest.fixture(scope="session", autouse=True)
def kernels_run():
    if mx.metal.is_available():
        yield
        return
    try:
        simulator.install()
    except simulator.ToolchainError as error:
        if os.environ.get("METAL_KERNELS_SKIP_SIMULATOR"):
            pytest.skip(str(error))
        raise
    yield
    simulator.uninstall()
