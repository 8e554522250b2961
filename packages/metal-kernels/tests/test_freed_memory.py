"""Memory that a process frees stays with it, unless the environment says what to do with it."""

import os
import subprocess
import sys

import pytest

from metal_kernels.blas import cpu_wheel_folders

PROGRAM = "from metal_kernels.freed_memory import keep_freed_memory; print(keep_freed_memory())"


@pytest.mark.skipif(sys.platform != "linux" or not cpu_wheel_folders(), reason="needs MLX's CPU wheel on Linux")
@pytest.mark.parametrize("own", [None, "65536"])
def test_settings_of_the_environment_are_kept(own):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    if own is not None:
        environment["MALLOC_TRIM_THRESHOLD_"] = own
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, check=True)
    assert found.stdout.decode().strip() == str(own is None)
