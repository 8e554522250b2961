"""The worker's process."""

import subprocess
import sys


def test_the_blas_is_chosen_before_mlx_is_imported() -> None:
    """As in vLLM's engine process, where nothing of ours has been imported yet."""
    program = "import vllm_metal_plugin.worker, metal_kernels; print(metal_kernels.CPU_BLAS)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not answer.stdout.startswith("too late")
