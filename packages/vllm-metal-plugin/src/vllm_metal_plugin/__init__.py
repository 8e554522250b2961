"""vLLM platform plugin that runs models on MLX."""

import os

__all__ = ["register_general", "register_platform"]


def register_platform() -> str | None:
    """Return the platform's class path, or None to leave vLLM to its other platforms.

    vLLM calls this twice in every process, so it imports nothing. vLLM takes an exception here for a missing
    platform and goes on with another one: a bad variable is left to ``register_general``, which vLLM does not
    silence.
    """
    from vllm_metal_plugin.envs import read_envs
    from vllm_metal_plugin.errors import EnvironmentVariableError

    try:
        if not read_envs().use_mlx:
            return None
    except EnvironmentVariableError:
        pass
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    return "vllm_metal_plugin.platform.MetalPlatform"


def register_general() -> None:
    """Install what must exist in every vLLM process before a configuration is built; safe to repeat."""
    from vllm_metal_plugin import launch, upstream_fixes
    from vllm_metal_plugin.envs import read_envs, register_with_vllm

    launch.print_own_errors()
    if not read_envs().use_mlx:
        return
    import metal_kernels  # noqa: F401  before anything imports MLX: it chooses the BLAS

    register_with_vllm()
    upstream_fixes.install()
    launch.install()
