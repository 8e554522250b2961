"""The worker's process."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["worker", "encoder_worker"])
def test_the_blas_is_chosen_before_mlx_is_imported(module: str) -> None:
    """As in vLLM's engine process, where nothing of ours has been imported yet."""
    program = f"import vllm_metal_plugin.{module}, metal_kernels; print(metal_kernels.CPU_BLAS)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not answer.stdout.startswith("too late")
