"""Every test here compiles kernels: without clang it fails, unless the environment asks to skip."""

import os
import sys

import pytest

from metal_kernels import simulator
from metal_kernels.simulator.toolchain import toolchain


@pytest.fixture(scope="session", autouse=True)
def clang() -> None:
    if sys.platform != "linux":
        pytest.skip("the simulator runs on Linux; here the GPU runs the kernels")
    if os.environ.get("METAL_KERNELS_SKIP_SIMULATOR"):
        try:
            toolchain()
        except simulator.ToolchainError as error:
            pytest.skip(str(error))
    toolchain()
