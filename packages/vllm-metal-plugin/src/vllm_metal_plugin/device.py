"""Which MLX device this process computes on, and how much memory it has."""

import os
from typing import Literal

from vllm_metal_plugin.envs import MetalEnvs, read_envs
from vllm_metal_plugin.errors import EnvironmentVariableError

Target = Literal["metal", "cuda", "cpu"]


def select_device(envs: MetalEnvs | None = None) -> Target:
    """Make MLX's default device the one that VLLM_MLX_DEVICE names and return the kernels' target.

    Raises:
        EnvironmentVariableError: A GPU was asked for and MLX has none here.
    """
    import mlx.core as mx

    from metal_kernels import target

    wanted = (envs or read_envs()).device
    if wanted == "cpu" and mx.default_device().type != mx.DeviceType.cpu:
        mx.set_default_device(mx.cpu)
    found = target()
    if wanted == "gpu" and found == "cpu":
        raise EnvironmentVariableError(
            "[environment] expected a GPU for VLLM_MLX_DEVICE=gpu, got an MLX that has only a CPU here. "
            "Unset the variable, or install MLX's backend for this machine."
        )
    return found


def device_name(target: Target) -> str:
    """The name a person would give the device."""
    import mlx.core as mx

    name = str(mx.device_info().get("device_name", "unknown"))
    return {"metal": "Apple", "cuda": "NVIDIA", "cpu": "CPU"}[target] + " " + name


def total_memory_bytes(target: Target) -> int:
    """Bytes to plan with: MLX's working-set limit on Metal, else the device's or the system's memory."""
    import mlx.core as mx

    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if target != "cpu" and key in info:
            return int(info[key])
    return system_memory_bytes()


def system_memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def wire_memory(target: Target, num_bytes: int) -> str:
    """Let MLX keep up to ``num_bytes`` of its buffers resident; returns what was done, for the log."""
    import mlx.core as mx

    if target != "metal":
        return "VLLM_METAL_WIRED_MEMORY has no effect: only Metal wires memory"
    limit = min(num_bytes, total_memory_bytes(target))
    mx.set_wired_limit(limit)
    return f"Wired up to {limit / 1e9:.2f} GB: macOS cannot reclaim it while the server runs"


def free_memory_bytes() -> int:
    """Memory that the system could hand out now without swapping."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)
