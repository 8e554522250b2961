"""The worker's process."""

import subprocess
import sys

MODULES = ("vllm_metal_plugin.worker", "vllm_metal_plugin.encoder_worker")
# vLLM is imported once; each module then in a process that goes on from there.
PROGRAM = """
import importlib, os, sys
import vllm.v1.worker.worker_base

for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        import metal_kernels
        print(f"{module}: {metal_kernels.CPU_BLAS}", flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_blas_is_chosen_before_mlx_is_imported() -> None:
    """As in vLLM's engine process, where vLLM is imported and nothing of ours that needs MLX."""
    answer = subprocess.run([sys.executable, "-c", PROGRAM, *MODULES], capture_output=True, text=True, check=True)
    chosen = dict(line.split(": ", 1) for line in answer.stdout.splitlines() if line.startswith("vllm_metal_plugin."))
    assert tuple(chosen) == MODULES, answer.stderr
    assert not any(blas.startswith("too late") for blas in chosen.values())
