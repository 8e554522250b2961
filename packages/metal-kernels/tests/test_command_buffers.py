"""What importing the package sets in the environment."""

import os
import subprocess
import sys

import pytest

NAME = "MLX_MAX_MB_PER_BUFFER"


@pytest.mark.parametrize("own", [None, "7"])
def test_a_limit_that_the_user_set_is_kept(own):
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    if own is not None:
        environment[NAME] = own
    program = f"import metal_kernels, os; print(os.environ['{NAME}'])"
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == (own or "4000")
