"""The worker's process."""

import subprocess
import sys

# As vLLM's processes begin: its own modules, then the plugins, then the worker.
PROGRAM = """
import importlib, sys
from vllm.plugins import load_general_plugins

load_general_plugins()
for module in ("vllm_metal_plugin.worker", "vllm_metal_plugin.encoder_worker"):
    importlib.import_module(module)
import metal_kernels
print("blas:", metal_kernels.CPU_BLAS)
"""


def test_the_blas_is_chosen_before_mlx_is_imported() -> None:
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    [chosen] = [line for line in answer.stdout.splitlines() if line.startswith("blas: ")]
    assert "too late" not in chosen
